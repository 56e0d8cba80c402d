"""An agent that hands its task on: a list of agents, of which the first gets the rest. Plain JSON-RPC, no SDK."""
import json, os, subprocess, sys

rest = json.loads(os.environ["LATTICE_TASK"])
me = {"run": os.environ["LATTICE_RUN_ID"], "trace": os.environ["TRACEPARENT"].split("-")[1], "agent": os.environ["LATTICE_AGENT"]}
if not rest:
    print(json.dumps([me]))
    sys.exit()
config = json.load(open(os.environ["LATTICE_MCP_CONFIG"]))["mcpServers"]["lattice"]
# As a client would start it: with few variables of its own.
few = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
server = subprocess.Popen([config["command"], *config["args"]], env={**few, **config.get("env", {})}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
count = 0


def request(method, params):
    global count
    count += 1
    server.stdin.write(json.dumps({"jsonrpc": "2.0", "id": count, "method": method, "params": params}) + "\n")
    server.stdin.flush()
    for line in server.stdout:
        message = json.loads(line)
        if message.get("id") == count and "method" not in message:
            return message["result"]
    sys.exit("the lattice went away")


def call(tool, **arguments):
    result = request("tools/call", {"name": tool, "arguments": arguments})
    if result.get("isError"):
        sys.exit(result["content"][0]["text"])
    return result["structuredContent"]


request("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "chain", "version": "0"}})
server.stdin.write(json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}) + "\n")
assigned = call("assign_work", agent_name=rest[0], task=json.dumps(rest[1:]))
settled = call("await_work", work_id=assigned["work_id"], timeout="60s")
settled = settled.get("works", [settled])[0]
print(json.dumps([me] + json.loads(settled["result"])))
server.stdin.close()
server.wait()
