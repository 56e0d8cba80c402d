"""Plays the language model of a coding agent, by a script, on loopback.

Speaks OpenAI Responses (codex), OpenAI chat completions (opencode) and Gemini generateContent (gemini-cli). Each request brings the
whole conversation, and the script is played from its start over the results that the agent's tools gave. So what it does next proves
what the agent saw. What it did not expect is refused with status 400 and stands in the report.

Prints its port at once, and a report when its input ends. It is the agents' proxy as well, and lets nothing through: what an agent
sent to the world beyond loopback stands in the report.
"""

import argparse
import http.server
import json
import sys
import threading
import urllib.parse

# How often the script waits again for work that is still going on.
WAITS_MAX = 20
# A task that the agent `upper` gives back: more than one answer of the lattice holds.
LINES = 600
LONG = "\n".join(f"line {n} of a text, \"quoted\" and \\ escaped" for n in range(1, LINES + 1))
# How much of what came is shown when it is not what the script expects.
SHOWN_MAX = 6000
# What is asked of an agent that has its model search for tools, and of one that has it write JavaScript.
SEARCH = "list agents, assign work, await work, check, answer, cancel, escalate"
SEARCH_IN_CODE = """text(JSON.stringify(ALL_TOOLS.filter(({ name }) => name.includes("lattice"))))"""
# Makes the calls of one turn side by side. Its first line names them, for the outputs do not.
CALLS_IN_CODE = """// %s
const failed = (error) => ({ content: [{ text: String(error) }] });
const made = %s.map(([name, given]) => tools[name](given).catch(failed));
(await Promise.all(made)).forEach(({ content }) => text(content[0].text));"""
TOOLS = {
    "list_available_agents",
    "get_agent_schema",
    "assign_work",
    "await_work",
    "check_work",
    "cancel_work",
    "answer_work",
    "escalate",
}


class Unexpected(Exception):
    pass


def check(condition, what, seen=None):
    if not condition:
        raise Unexpected(what if seen is None else f"{what}; saw {json.dumps(seen)[:SHOWN_MAX]}")


class Output:
    """What a tool gave, as the agent shows it to its model."""

    def __init__(self, text):
        self.text = text

    def json(self):
        """The object in it: agents put words of their own around it."""
        start = self.text.find("{")
        check(start >= 0, "a tool's result has no JSON object", self.text)
        try:
            value, _ = json.JSONDecoder().raw_decode(self.text[start:])
        except ValueError as error:
            raise Unexpected(f"a tool's result is not JSON ({error}); saw {self.text[:SHOWN_MAX]}") from error
        return value


class Script:
    """What the model does: yields the calls of a turn, takes their outputs, and returns its last words."""

    def __init__(self, answer, late_from):
        self.answer = answer
        # With how many outputs the agent first described the one that comes late.
        self.late_from = late_from
        self.taken = 0
        self.passed = []

    def play(self, outputs):
        """The next calls, or the last words; as far as the outputs go."""
        self.passed = []
        turns = self.turns()
        try:
            calls = next(turns)
            outputs = list(outputs)
            while outputs:
                names = [name for name, _ in calls]
                came = outputs[: len(calls)]
                check([name for name, _ in came] == names, f"the agent has results of other calls than {names}", [name for name, _ in came])
                outputs = outputs[len(calls) :]
                self.taken += len(came)
                calls = turns.send([Output(text) for _, text in came])
        except StopIteration as end:
            check(not outputs, "the agent goes on after the last words", [text for _, text in outputs])
            return [], end.value
        return calls, None

    def turns(self):
        [listed] = yield [("list_available_agents", {})]
        agents = {agent["name"]: agent for agent in listed.json()["agents"]}
        check({"asker", "careful", "herald", "quiet", "slow", "upper"} <= agents.keys(), "agents are missing", listed.text)
        check(all(agent["status"] == "online" for agent in agents.values()), "an agent is not online", listed.text)
        self.passed.append("tools")

        [refused] = yield [("assign_work", {"agent_name": "slwo", "task": "4"})]
        check("slwo" in refused.text and "slow" in refused.text, "the error does not name the agents that exist", refused.text)
        self.passed.append("unknown")

        assigned = yield [
            ("assign_work", {"agent_name": "slow", "task": "4"}),
            ("assign_work", {"agent_name": "asker", "task": "paint"}),
        ]
        check(all(output.json()["status"] == "ASSIGNED" for output in assigned), "not assigned", [output.text for output in assigned])
        slow, asker = ids = [output.json()["work_id"] for output in assigned]
        self.passed.append("assign")

        work = yield from self.wait([asker], until="ESCALATED")
        check("which colour" in work[asker]["question"]["reason"], "no question", work)
        check("answer_work" in work[asker]["next"], "the model is not told what to do next", work)
        [answered] = yield [("answer_work", {"work_id": asker, "answer": self.answer})]
        check(answered.json()["work_id"] == asker, "the answer went elsewhere", answered.text)
        work = yield from self.wait(ids, until="COMPLETE")
        self.passed.append("await")
        check(work[slow]["result"] == {"steps": 4}, "slow did not do its work", work)
        check(self.answer in json.dumps(work[asker]["result"]), "the answer did not arrive", work)
        self.passed.append("escalate")

        [asked] = yield [("assign_work", {"agent_name": "careful", "task": "act"})]
        careful = asked.json()["work_id"]
        waiting = yield from self.wait([careful], until="ESCALATED")
        check("only a person may answer" in waiting[careful]["next"], "the model is not told to ask its user", waiting)
        [stopped] = yield [("cancel_work", {"work_id": careful, "reason": "nobody is there"})]
        check(stopped.json()["work_id"] == careful, "something else was cancelled", stopped.text)
        yield from self.wait([careful], until="CANCELLED")
        self.passed += ["alone", "cancel"]

        [given] = yield [("assign_work", {"agent_name": "upper", "task": LONG})]
        upper = given.json()["work_id"]
        large = yield from self.wait([upper], until="COMPLETE")
        check(large[upper]["result_ref"]["size"] == len(LONG), "a large result has no reference", large)
        [read] = yield [("check_work", {"work_id": upper, "lines": f"1-{LINES}"})]
        part = read.json()["selection"]
        check(part["truncated"] is True, "the agent cut what is not too large for it, or we did not", read.text)
        check(LONG.upper().startswith(part["text"]), "the agent does not show its model the selection whole", read.text)
        [rest] = yield [("check_work", {"work_id": upper, "lines": f"{LINES}-{LINES}"})]
        check(rest.json()["selection"]["text"].strip() == LONG.upper().splitlines()[-1], "another line than the last", rest.text)
        self.passed.append("large")

        [sent] = yield [("assign_work", {"agent_name": "herald", "task": "say that another comes"})]
        yield from self.wait([sent.json()["work_id"]], until="COMPLETE")

        [begun] = yield [("assign_work", {"agent_name": "quiet", "task": "think"})]
        quiet = begun.json()["work_id"]
        cuts = 0
        for _ in range(WAITS_MAX):
            [cut] = yield [("await_work", {"work_ids": [quiet]})]
            if "timed out" not in cut.text:
                break
            cuts += 1
        check(cuts > 0, "the agent did not cut the call", cut.text)
        thought = yield from self.wait([quiet], until="COMPLETE")
        check(thought[quiet]["attempt"] == 1, "a wait that was cut had an effect on the work", thought)
        self.passed.append("cut")

        # That took longer than a new agent and the news of it need.
        if self.late_from is not None and self.taken >= self.late_from:
            self.passed.append("changes")
        [given] = yield [("assign_work", {"agent_name": "late", "task": "new"})]
        late = given.json()["work_id"]
        done = yield from self.wait([late], until="COMPLETE")
        check(done[late]["result"] == "NEW", "late did not do its work", done)
        self.passed.append("late")

        return f"The steps were {work[slow]['result']['steps']}; asker said: {work[asker]['result']}"

    def wait(self, ids, until):
        """Waits until all works have a status; the works by their ids."""
        for _ in range(WAITS_MAX):
            [waited] = yield [("await_work", {"work_ids": ids})]
            works = waited.json().get("works")
            check(works is not None, "await_work shows no works", waited.text)
            work = {work["work_id"]: work for work in works}
            check(work.keys() == set(ids), "await_work shows other works", waited.text)
            if all(one["status"] == until for one in work.values()):
                return work
            going = ("PENDING", "ACCEPTED", "ESCALATED", until)
            check(all(one["status"] in going for one in work.values()), f"not {until}", waited.text)
        raise Unexpected(f"the works {ids} are not {until} after {WAITS_MAX} waits")


class Responses:
    """OpenAI's Responses, as codex speaks it: it shows its model tools, or has it search for them, or write code that calls them."""

    @staticmethod
    def offered(body):
        tools = []
        for call, text in Responses.ran(body):
            if call["call_id"] == "search":
                for tool in json.loads(text[0]):
                    needed = [name for name in ("agent_name", "task") if f"{name}: string;" in tool["description"]]
                    tools.append((tool["name"], {"code": True}, {**tool, "parameters": {"required": needed}}))
        found = [tool for item in body["input"] if item["type"] == "tool_search_output" for tool in item["tools"]]
        for tool in body.get("tools", []) + found:
            if tool["type"] == "namespace":
                tools += [(one["name"], {"namespace": tool["name"]}, one) for one in tool["tools"]]
            elif tool["type"] == "function":
                tools.append((tool["name"], {}, tool))
        return [(name, how, tool.get("description", ""), tool["parameters"]) for name, how, tool in tools]

    @staticmethod
    def search(body):
        """A search for tools, where the agent shows its model none before it searches."""
        if any(item.get("call_id") == "search" for item in body["input"]):
            return None
        if any(tool["type"] == "tool_search" for tool in body.get("tools", [])):
            arguments = {"query": SEARCH, "limit": len(TOOLS)}
            return Responses.events([{"type": "tool_search_call", "call_id": "search", "execution": "client", "arguments": arguments}])
        if any(item["type"] == "additional_tools" for item in body["input"]):
            return Responses.events([Responses.code("search", SEARCH_IN_CODE)])
        return None

    @staticmethod
    def code(call_id, text):
        return {"type": "custom_tool_call", "call_id": call_id, "namespace": "functions", "name": "exec", "input": text}

    @staticmethod
    def ran(body):
        """The code that ran, and what it said; the first part is the agent's own."""
        calls = {item["call_id"]: item for item in body["input"] if item["type"] == "custom_tool_call"}
        for item in body["input"]:
            if item["type"] == "custom_tool_call_output":
                yield calls[item["call_id"]], [part["text"] for part in item["output"][1:]]

    @staticmethod
    def outputs(body):
        for call, texts in Responses.ran(body):
            if call["call_id"] != "search":
                names = call["input"].splitlines()[0].split()[1:]
                check(len(names) == len(texts), f"the code that called {names} said something else", texts)
                yield from zip(names, texts)
        calls = {item["call_id"]: item["name"] for item in body["input"] if item["type"] == "function_call"}
        for item in body["input"]:
            if item["type"] == "function_call_output":
                output = item["output"]
                if not isinstance(output, str):
                    output = "\n".join(part.get("text", "") for part in output)
                yield calls[item["call_id"]], output

    @staticmethod
    def reply(calls, words):
        if any(how.get("code") for _, _, how, _ in calls):
            names = " ".join(name for _, name, _, _ in calls)
            text = CALLS_IN_CODE % (names, json.dumps([[name, arguments] for _, name, _, arguments in calls]))
            return Responses.events([Responses.code(calls[0][0], text)])
        items = [
            {"type": "function_call", "id": f"fc_{call_id}", "call_id": call_id, "name": name, "arguments": json.dumps(arguments), **how}
            for call_id, name, how, arguments in calls
        ]
        if words is not None:
            items.append({"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": words}]})
        return Responses.events(items)

    @staticmethod
    def events(items):
        usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
        events = [{"type": "response.created", "response": {"id": "resp_1"}}]
        events += [{"type": "response.output_item.done", "output_index": at, "item": item} for at, item in enumerate(items)]
        events.append({"type": "response.completed", "response": {"id": "resp_1", "usage": usage}})
        return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]


class Chat:
    """OpenAI's chat completions, as opencode speaks it."""

    @staticmethod
    def offered(body):
        tools = [tool["function"] for tool in body.get("tools", [])]
        return [(tool["name"], {}, tool.get("description", ""), tool["parameters"]) for tool in tools]

    @staticmethod
    def outputs(body):
        calls = {call["id"]: call["function"]["name"] for message in body["messages"] for call in message.get("tool_calls") or []}
        for message in body["messages"]:
            if message["role"] == "tool":
                content = message["content"]
                if not isinstance(content, str):
                    content = "\n".join(part.get("text", "") for part in content)
                yield calls[message["tool_call_id"]], content

    @staticmethod
    def reply(calls, words):
        made = [
            {"index": at, "id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for at, (call_id, name, _, arguments) in enumerate(calls)
        ]
        deltas = [{"role": "assistant", "content": words}] + ([{"tool_calls": made}] if made else [])
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls" if made else "stop"})
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        shared = {"id": "chat_1", "object": "chat.completion.chunk", "created": 0, "model": "fake-model"}
        chunks = [{**shared, "choices": [choice]} for choice in choices] + [{**shared, "choices": [], "usage": usage}]
        return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]


class Gemini:
    """Gemini's generateContent, as gemini-cli speaks it."""

    @staticmethod
    def offered(body):
        tools = [tool for group in body.get("tools", []) for tool in group.get("functionDeclarations", [])]
        return [
            (tool["name"], {}, tool.get("description", ""), tool.get("parametersJsonSchema") or tool.get("parameters") or {})
            for tool in tools
        ]

    @staticmethod
    def outputs(body):
        for content in body["contents"]:
            for part in content.get("parts", []):
                if "functionResponse" in part:
                    response = part["functionResponse"]["response"]
                    yield part["functionResponse"]["name"], response.get("output") or response.get("error") or json.dumps(response)

    @staticmethod
    def reply(calls, words):
        parts = [{"functionCall": {"id": call_id, "name": name, "args": arguments}} for call_id, name, _, arguments in calls]
        if words is not None:
            parts.append({"text": words})
        candidate = {"index": 0, "content": {"role": "model", "parts": parts}, "finishReason": "STOP"}
        usage = {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2}
        return [f"data: {json.dumps({'candidates': [candidate], 'usageMetadata': usage, 'modelVersion': 'fake-model'})}\n\n"]


class Model:
    """The script, what it was asked, and what went wrong."""

    def __init__(self, answer, log):
        self.answer = answer
        self.log = log
        self.late_from = None
        self.lock = threading.Lock()
        self.report = {"passed": [], "tools": [], "words": None, "failed": None, "refused": []}

    def tell(self, *what):
        if self.log:
            print(json.dumps(what), file=self.log, flush=True)

    def respond(self, path, body):
        dialect = Responses if path.endswith("/responses") else Chat if path.endswith("/chat/completions") else Gemini
        with self.lock:
            self.tell(path, body)
            offered = {}
            for name, how, description, parameters in dialect.offered(body):
                ours = next((tool for tool in TOOLS if name.endswith(tool)), None)
                if ours:
                    offered[ours] = (name, how, description, parameters)
            if not offered:
                search = dialect is Responses and Responses.search(body)
                if search:
                    return search
                # An agent has small things to ask as well, such as a title for the conversation.
                return dialect.reply([], "A title")
            check(offered.keys() == TOOLS, "the agent does not offer all tools", sorted(offered))
            _, _, description, parameters = offered["assign_work"]
            check("**asker**" in description, "the agent does not show its model who there is", description)
            check({"agent_name", "task"} <= set(parameters["required"]), "the agent shows its model other parameters", parameters)
            ours = {name: tool for tool, (name, *_) in offered.items()}
            outputs = [(ours.get(name, name), text) for name, text in dialect.outputs(body)]
            if self.late_from is None and "**late**" in description:
                self.late_from = len(outputs)
            script = Script(self.answer, self.late_from)
            calls, words = script.play(outputs)
            self.report.update(passed=script.passed, tools=sorted(ours), words=words)
            made = [
                (f"call_{len(outputs) + at}", offered[tool][0], offered[tool][1], arguments)
                for at, (tool, arguments) in enumerate(calls)
            ]
            reply = dialect.reply(made, words)
            self.tell(path, reply)
            return reply

    def fail(self, error):
        with self.lock:
            self.tell("failed", str(error))
            self.report["failed"] = self.report["failed"] or str(error)

    def refuse(self, what):
        with self.lock:
            self.tell("refused", what)
            self.report["refused"].append(what)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = None

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if urllib.parse.urlsplit(self.path).netloc:
            return self.refuse()
        try:
            path = urllib.parse.urlsplit(self.path).path
            reply = self.model.respond(path, json.loads(body))
        except (Unexpected, KeyError, TypeError, ValueError) as error:
            text = str(error) if isinstance(error, Unexpected) else f"cannot read {self.path}: {error!r} in {body[:SHOWN_MAX]!r}"
            self.model.fail(text)
            return self.say(400, json.dumps({"error": {"message": text, "code": 400, "status": "INVALID_ARGUMENT"}}))
        if path.endswith(":generateContent"):
            return self.say(200, reply[0].removeprefix("data: "))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write("".join(reply).encode())
        self.close_connection = True

    def refuse(self):
        self.model.refuse(f"{self.command} {self.path}"[:200])
        self.say(403, json.dumps({"error": "nothing but loopback here"}))

    do_GET = do_PUT = do_CONNECT = do_HEAD = do_OPTIONS = refuse

    def say(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text.encode())
        self.close_connection = True

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--answer", required=True, help="what the model answers to the agent of the lattice that asks")
    parser.add_argument("--log", type=argparse.FileType("w"), help="where every request and reply is written to")
    options = parser.parse_args()
    model = Handler.model = Model(options.answer, options.log)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    print(json.dumps(model.report), flush=True)


main()
