"""An agent that assigns what its task lists, [agent, task] each, one after the other; gives what came of each. Plain JSON-RPC, no SDK."""
import json, os, subprocess, sys

config = json.load(open(os.environ["LATTICE_MCP_CONFIG"]))["mcpServers"]["lattice"]
server = subprocess.Popen([config["command"], *config["args"]], env={**os.environ, **config.get("env", {})},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
count = 0


def send(message):
    server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    server.stdin.flush()


def request(method, params):
    global count
    count += 1
    send({"id": count, "method": method, "params": params})
    for line in server.stdout:
        message = json.loads(line)
        if message.get("id") == count and "method" not in message:
            return message["result"]
    sys.exit("the lattice went away")


def call(tool, **arguments):
    result = request("tools/call", {"name": tool, "arguments": arguments})
    if result.get("isError"):
        return {"refused": result["content"][0]["text"]}
    return result["structuredContent"]


request("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "assigner", "version": "0"}})
send({"method": "notifications/initialized"})
came = []
for agent, task in json.loads(os.environ["LATTICE_TASK"]):
    assigned = call("assign_work", agent_name=agent, task=task if isinstance(task, str) else json.dumps(task))
    if "work_id" in assigned:
        settled = call("await_work", work_id=assigned["work_id"], timeout="60s")
        assigned = settled.get("works", [settled])[0]
    came.append(assigned)
print(json.dumps(came))
server.stdin.close()
server.wait()
