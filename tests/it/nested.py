"""An agent that uses the lattice as a child of its own run: makes the calls that its task lists, and prints what came of them.

The task is JSON: {"calls": [[tool, arguments], ...], "repeat": until refused, "stay": do not end}. "$WORK" in it is its own work."""
import json, os, subprocess, sys, time

task = json.loads(os.environ["LATTICE_TASK"].replace("$WORK", os.environ["LATTICE_WORK_ID"]))
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


def call(tool, arguments):
    result = request("tools/call", {"name": tool, "arguments": arguments})
    return {"refused": result["content"][0]["text"]} if result.get("isError") else result["structuredContent"]


request("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "nested", "version": "0"}})
send({"method": "notifications/initialized"})
answers = []
while True:
    for tool, arguments in task["calls"]:
        answer = call(tool, arguments)
        answers.append(answer)
        with open("answers", "a") as file:
            file.write(json.dumps(answer) + "\n")
    if not task.get("repeat") or "refused" in answers[-1]:
        break
if task.get("stay"):
    time.sleep(300)
print(json.dumps(answers))
server.stdin.close()
server.wait()
