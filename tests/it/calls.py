"""What an agent needs to call the lattice as a child of its own run: plain JSON-RPC, no SDK. The agent itself follows."""
import json, os, subprocess, sys, time

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
    return {"refused": result["content"][0]["text"]} if result.get("isError") else result["structuredContent"]


def leave(said):
    print(json.dumps(said))
    server.stdin.close()
    server.wait()


request("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "agent", "version": "0"}})
send({"method": "notifications/initialized"})
