"""Drives a lattice through the Python SDK, as an orchestrator's host does, and prints what it saw as one JSON report.

Runs with mcp 2.3 and with fastmcp 4.1 (--mode auto and --mode 2026-07-28 speak 2026-07-28, --mode legacy 2025-11-25), and with
mcp 1.30 (2025-11-25). The report tells what passed, and what this client has no way to do, and why.
Exits with 1 and a readable message when a scenario fails.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import pathlib
import sys
import traceback

SDK = importlib.metadata.version("mcp")
IS_2 = SDK.startswith("2.")
try:
    FAST = importlib.metadata.version("fastmcp")
except importlib.metadata.PackageNotFoundError:
    FAST = None

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


class Unable(Exception):
    """This client has no way to do it."""


def check(condition, what, seen=None):
    if not condition:
        raise AssertionError(what if seen is None else f"{what}; saw {json.dumps(seen, default=str)[:2000]}")


def plain(model):
    """A model as it was on the wire."""
    return model.model_dump(by_alias=True, mode="json", exclude_none=True)


class Heard:
    """The notifications that came without being asked for."""

    def __init__(self):
        self.all = []
        self.new = asyncio.Condition()

    async def add(self, message):
        method = getattr(getattr(message, "root", message), "method", None)
        if method is not None:
            async with self.new:
                self.all.append(plain(getattr(message, "root", message)))
                self.new.notify_all()

    def follow(self, method, uri=None):
        """A function that waits for the next such notification, from now on."""
        at = len(self.all)

        def found(message):
            return message["method"] == method and uri in (None, (message.get("params") or {}).get("uri"))

        async def wait():
            nonlocal at
            async with self.new:
                await self.new.wait_for(lambda: any(map(found, self.all[at:])))
                at += next(i for i, message in enumerate(self.all[at:]) if found(message)) + 1

        return wait


class Forms:
    """The forms that a person was shown, and what they say."""

    def __init__(self):
        self.shown = []
        self.says = {"action": "cancel"}

    async def show(self, context, params):
        if IS_2:
            from mcp_types import ElicitResult
        else:
            from mcp.types import ElicitResult
        self.shown.append(plain(params))
        return ElicitResult(**self.says)


class Fast:
    """fastmcp's client, under the names that the SDK's has."""

    def __init__(self, client):
        self.list_tools = client.list_tools_mcp
        self.list_resources = client.list_resources_mcp
        self.list_resource_templates = client.list_resource_templates_mcp
        self.read_resource = client.read_resource_mcp
        self.list_prompts = client.list_prompts_mcp
        self.get_prompt = client.get_prompt_mcp
        self.complete = client.complete_mcp
        self._call_tool = client.call_tool_mcp
        for name in ("listen", "subscribe_resource", "unsubscribe_resource"):
            if hasattr(client, name):
                setattr(self, name, getattr(client, name))

    def call_tool(self, name, arguments, progress_callback):
        return self._call_tool(name, arguments, progress_handler=progress_callback)


class Lattice:
    """One connection, the same for all clients."""

    def __init__(self, client, protocol, heard, forms):
        self.forms = forms
        self.client = client
        self.protocol = protocol
        self.heard = heard
        self.modern = protocol >= "2026"

    async def call(self, tool, progress=None, **arguments):
        """Calls a tool that must succeed; its structured content."""
        result = await self.call_raw(tool, progress, **arguments)
        check(not result.get("isError"), f"{tool} failed", result)
        check("structuredContent" in result, f"{tool} gave no structured content", result)
        text = json.loads(result["content"][0]["text"])
        check(text == result["structuredContent"], f"{tool}: the text is not the structured content", result)
        return text

    async def call_raw(self, tool, progress=None, **arguments):
        async def on_progress(value, total, message):
            if progress is not None:
                progress.append(value)

        return plain(await self.client.call_tool(tool, arguments, progress_callback=on_progress))

    async def tools(self):
        return {tool["name"]: tool for tool in plain(await self.client.list_tools())["tools"]}

    @contextlib.asynccontextmanager
    async def changes_of_tools(self):
        """A function that waits for the next change of the tools."""
        if not self.modern:
            yield self.heard.follow("notifications/tools/list_changed")
            return
        self.needs("listen", "subscriptions/listen")
        async with self.client.listen(tools_list_changed=True) as subscription:
            yield lambda: anext(aiter(subscription))

    @contextlib.asynccontextmanager
    async def changes_of(self, uri):
        """A function that waits for the next change of a resource."""
        if not self.modern:
            self.needs("subscribe_resource", "resources/subscribe")
            await self.client.subscribe_resource(url(uri))
            yield self.heard.follow("notifications/resources/updated", uri)
            await self.client.unsubscribe_resource(url(uri))
            return
        self.needs("listen", "subscriptions/listen")
        async with self.client.listen(resource_subscriptions=[uri]) as subscription:
            yield lambda: anext(aiter(subscription))

    def needs(self, name, method):
        if not hasattr(self.client, name):
            raise Unable(f"its client does not know `{method}`")

    async def read(self, uri):
        return plain(await self.client.read_resource(url(uri)))["contents"][0]

    async def complete(self, template, name, value):
        if IS_2:
            from mcp_types import ResourceTemplateReference
        else:
            from mcp.types import ResourceTemplateReference
        reference = ResourceTemplateReference(type="ref/resource", uri=template)
        return plain(await self.client.complete(reference, {"name": name, "value": value}))["completion"]["values"]

    async def settled(self, *ids, progress=None):
        """The works after their end."""
        while True:
            works = (await self.call("await_work", progress, work_ids=list(ids)))["works"]
            check([w["work_id"] for w in works] == list(ids), "works come back in another order", works)
            if all(w["status"] in ("COMPLETE", "FAILED", "CANCELLED", "ESCALATED") for w in works):
                return works


def url(uri):
    if IS_2:
        return uri
    from pydantic import AnyUrl

    return AnyUrl(uri)


async def tools(lattice, agents):
    listed = await lattice.tools()
    check(set(listed) == TOOLS, "other tools than the eight", sorted(listed))
    for name, tool in listed.items():
        for field in ("title", "description", "inputSchema", "outputSchema", "annotations"):
            check(tool.get(field), f"{name} has no {field}", tool)
    for agent in ("upper", "slow", "asker"):
        check(f"**{agent}**" in listed["assign_work"]["description"], f"assign_work does not describe {agent}", listed["assign_work"])
    known = (await lattice.call("list_available_agents"))["agents"]
    check({"upper", "slow", "asker"} <= {agent["name"] for agent in known}, "agents are missing", known)
    check((await lattice.call("get_agent_schema", agent_name="upper"))["name"] == "upper", "no schema of upper")


async def assign(lattice, agents):
    assigned = await asyncio.gather(*(lattice.call("assign_work", agent_name="upper", task=task) for task in ("hello", "there")))
    for work in assigned:
        check(work["status"] == "ASSIGNED", "not assigned", work)
    ids = [work["work_id"] for work in assigned]
    done = await lattice.settled(*ids)
    check([w["status"] for w in done] == ["COMPLETE", "COMPLETE"], "upper did not do its work", done)
    check([w["result"] for w in done] == ["HELLO", "THERE"], "upper did something else", done)
    check(await lattice.settled(*ids) == done, "awaiting again gives something else", done)
    checked = await lattice.call("check_work", work_id=ids[0])
    check((checked["status"], checked["result"]) == ("COMPLETE", "HELLO"), "check_work sees it otherwise", checked)


async def progress(lattice, agents):
    id = (await lattice.call("assign_work", agent_name="slow", task="5"))["work_id"]
    heard = []
    (slow,) = await lattice.settled(id, progress=heard)
    check((slow["status"], slow["result"]) == ("COMPLETE", {"steps": 5}), "slow did not do its work", slow)
    check(heard, "no progress arrived")
    check(heard == sorted(set(heard)), "progress does not rise", heard)


async def cancel(lattice, agents):
    id = (await lattice.call("assign_work", agent_name="slow", task="600"))["work_id"]
    while (await lattice.call("check_work", work_id=id))["status"] != "ACCEPTED":
        await asyncio.sleep(0.02)
    cancelled = await lattice.call("cancel_work", work_id=id, reason="not needed")
    check(cancelled["status"] == "CANCELLED", "not cancelled", cancelled)
    check((await lattice.call("check_work", work_id=id))["status"] == "CANCELLED", "not cancelled for good")


async def escalate(lattice, agents):
    id = (await lattice.call("assign_work", agent_name="asker", task="paint"))["work_id"]
    (asking,) = await lattice.settled(id)
    check(asking["status"] == "ESCALATED", "did not escalate", asking)
    check("which colour" in asking["question"]["reason"], "no question", asking)
    await lattice.call("answer_work", work_id=id, answer="blue")
    (done,) = await lattice.settled(id)
    check(done["status"] == "COMPLETE" and "blue" in json.dumps(done["result"]), "the answer did not arrive", done)


async def person(lattice, agents):
    lattice.forms.says = {"action": "accept", "content": {"answer": "yes"}}
    id = (await lattice.call("assign_work", agent_name="careful", task="act"))["work_id"]
    (done,) = await lattice.settled(id)
    check(done["status"] == "COMPLETE" and "yes" in json.dumps(done["result"]), "the person's answer did not arrive", done)
    (form,) = lattice.forms.shown
    check("careful" in form["message"] and "may I?" in form["message"], "the form does not show who asks what", form)
    check(form["requestedSchema"]["properties"]["answer"]["enum"] == ["yes", "no"], "the form offers no choice", form)

    lattice.forms.says = {"action": "decline"}
    id = (await lattice.call("assign_work", agent_name="careful", task="act"))["work_id"]
    (asking,) = await lattice.settled(id)
    check(asking["status"] == "ESCALATED", "declining is taken for an answer", asking)
    check(len(lattice.forms.shown) == 2, "the form was shown again and again", lattice.forms.shown)
    refused = await lattice.call_raw("answer_work", work_id=id, answer="yes")
    check(refused.get("isError"), "a model answered for a person", refused)
    lattice.forms.says = {"action": "accept", "content": {"answer": "no"}}
    await lattice.call("answer_work", work_id=id, answer="yes")
    (done,) = await lattice.settled(id)
    check("no" in json.dumps(done["result"]) and "yes" not in json.dumps(done["result"]), "not what the person said", done)


async def lost(lattice, agents):
    id = (await lattice.call("assign_work", agent_name="careful", task="act"))["work_id"]
    while (await lattice.call("check_work", work_id=id))["status"] != "ESCALATED":
        await asyncio.sleep(0.02)
    seen = await lattice.call("check_work")
    check(len(json.dumps(seen)) < 1600, "what is outstanding is too much", seen)
    check([(w["work_id"], w["question"]) for w in seen["works"]] == [(id, "may I?")], "the question is not seen", seen)
    check(seen["settled_since_last_look"] >= 1 and seen["settled_last"][0]["new"], "what settled is not seen", seen)
    again = await lattice.call("check_work")
    check(again["settled_since_last_look"] == 0, "what was told is told as new again", again)
    await lattice.call("cancel_work", work_id=id)


async def unknown(lattice, agents):
    result = await lattice.call_raw("assign_work", agent_name="uper", task="hello")
    check(result.get("isError"), "an unknown agent is no error", result)
    text = result["content"][0]["text"]
    check("uper" in text and "upper" in text and "slow" in text, "the error does not list the agents", text)


async def changes(lattice, agents):
    async with lattice.changes_of_tools() as changed:
        await lattice.tools()
        upper = (agents / "upper.md").read_text()
        fresh = agents / ".late"
        fresh.write_text(upper.replace("name: upper", "name: late").replace("upper case", "UPPER CASE, but late"))
        fresh.rename(agents / "late.md")
        described = ""
        while "**late**" not in described:
            await changed()
            described = (await lattice.tools())["assign_work"]["description"]
    id = (await lattice.call("assign_work", agent_name="late", task="new"))["work_id"]
    (done,) = await lattice.settled(id)
    check(done["result"] == "NEW", "the new agent does not work", done)


async def resources(lattice, agents):
    id = (await lattice.call("assign_work", agent_name="upper", task="read me"))["work_id"]
    await lattice.settled(id)
    listed = plain(await lattice.client.list_resources())["resources"]
    check("agent://upper" in [resource["uri"] for resource in listed], "agents are no resources", listed)
    templates = plain(await lattice.client.list_resource_templates())["resourceTemplates"]
    check({"agent://{name}", "work://{id}"} <= {t["uriTemplate"] for t in templates}, "templates are missing", templates)
    check(json.loads((await lattice.read("agent://upper"))["text"])["name"] == "upper", "agent://upper is something else")
    check(json.loads((await lattice.read(f"work://{id}"))["text"])["status"] == "COMPLETE", "the work's resource is behind")
    check("READ ME" in (await lattice.read(f"work://{id}/result"))["text"], "the result's resource is something else")
    values = await lattice.complete("agent://{name}", "name", "up")
    check(values == ["upper"], "no completion of agents", values)
    try:
        await lattice.read("agent://nobody")
    except Exception as error:
        check("nobody" in str(error), "the error does not name what is missing", str(error))
    else:
        raise AssertionError("a resource that does not exist was read")


async def prompts(lattice, agents):
    listed = {prompt["name"] for prompt in plain(await lattice.client.list_prompts())["prompts"]}
    check({"orchestrate", "delegate"} <= listed, "prompts are missing", sorted(listed))
    filled = plain(await lattice.client.get_prompt("delegate", {"goal": "paint the fence"}))
    check("paint the fence" in json.dumps(filled["messages"]), "the goal is not in the prompt", filled)


async def subscription(lattice, agents):
    id = (await lattice.call("assign_work", agent_name="asker", task="paint"))["work_id"]
    await lattice.settled(id)
    async with lattice.changes_of(f"work://{id}") as changed:
        await lattice.call("answer_work", work_id=id, answer="green")
        await changed()
    await lattice.settled(id)


SCENARIOS = [tools, assign, progress, cancel, escalate, person, lost, unknown, changes, resources, prompts, subscription]


@contextlib.asynccontextmanager
async def connect(options):
    heard, forms = Heard(), Forms()
    headers = {"Authorization": f"Bearer {options.token}"} if options.token else {}
    if FAST:
        from fastmcp import Client
        from fastmcp.client.transports import StdioTransport, StreamableHttpTransport

        if options.url:
            target = StreamableHttpTransport(options.url, headers=headers)
        else:
            target = StdioTransport(options.stdio[0], options.stdio[1:], env=dict(os.environ), keep_alive=False)

        async def show(message, kind, params, context):
            return await forms.show(context, params)

        async with Client(target, mode=options.mode, message_handler=heard.add, elicitation_handler=show) as client:
            yield Lattice(Fast(client), client.protocol_version, heard, forms)
        return
    if IS_2:
        from mcp import Client
        from mcp.client.stdio import StdioServerParameters
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        async with contextlib.AsyncExitStack() as stack:
            if options.url:
                http = await stack.enter_async_context(create_mcp_http_client(headers=headers))
                target = streamable_http_client(options.url, http_client=http)
            else:
                target = StdioServerParameters(command=options.stdio[0], args=options.stdio[1:], env=dict(os.environ))
            client = await stack.enter_async_context(Client(target, mode=options.mode, message_handler=heard.add, elicitation_callback=forms.show))
            yield Lattice(client, client.protocol_version, heard, forms)
        return

    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    async with contextlib.AsyncExitStack() as stack:
        if options.url:
            http = await stack.enter_async_context(create_mcp_http_client(headers=headers))
            streams = await stack.enter_async_context(streamable_http_client(options.url, http_client=http))
        else:
            server = StdioServerParameters(command=options.stdio[0], args=options.stdio[1:], env=dict(os.environ))
            streams = await stack.enter_async_context(stdio_client(server))
        session = await stack.enter_async_context(ClientSession(streams[0], streams[1], message_handler=heard.add, elicitation_callback=forms.show))
        yield Lattice(session, (await session.initialize()).protocolVersion, heard, forms)


async def run(options):
    name = f"Python `fastmcp` {FAST}" if FAST else f"Python `mcp` {SDK}"
    report = {"client": name, "protocol": None, "passed": [], "unable": {}}
    async with connect(options) as lattice:
        report["protocol"] = lattice.protocol
        for scenario in SCENARIOS:
            if options.only and scenario.__name__ not in options.only:
                continue
            try:
                await asyncio.wait_for(scenario(lattice, options.agents), options.timeout)
            except Unable as error:
                report["unable"][scenario.__name__] = str(error)
                continue
            except TimeoutError as error:
                raise TimeoutError(f"scenario {scenario.__name__} did not end within {options.timeout:.0f} s") from error
            except Exception as error:
                raise RuntimeError(f"scenario {scenario.__name__}: {error}") from error
            report["passed"].append(scenario.__name__)
    return report


def causes(error):
    """The errors inside task groups."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for inner in error.exceptions for cause in causes(inner)]
    return [error]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server on HTTP")
    where.add_argument("--stdio", type=json.loads, help="a server to start: a JSON array of its program and arguments")
    parser.add_argument("--token", help="the bearer token of a server on HTTP")
    parser.add_argument("--mode", default="auto", choices=["auto", "legacy", "2026-07-28"])
    parser.add_argument("--agents", type=pathlib.Path, required=True, help="the folder of agent files that the server watches")
    parser.add_argument("--timeout", type=float, default=30, help="seconds that one scenario may take")
    parser.add_argument("only", nargs="*", help="the scenarios to run; all when none is named")
    options = parser.parse_args()
    try:
        report = asyncio.run(run(options))
    except BaseException as error:
        for cause in causes(error):
            traceback.print_exception(cause.__cause__ or cause, limit=-4)
        print("FAILED: " + "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes(error)), file=sys.stderr)
        sys.exit(1)
    print(json.dumps(report))


if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup
main()
