// Drives a lattice through the TypeScript SDKs, as an orchestrator's host does, and prints what it saw as one JSON report.
//
// --sdk client is @modelcontextprotocol/client 2.x (--mode legacy by default, auto and 2026-07-28 speak 2026-07-28),
// --sdk sdk is @modelcontextprotocol/sdk 1.x. Exits with 1 and a readable message when a scenario fails.
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { isDeepStrictEqual, parseArgs } from 'node:util';

const TOOLS = [
  'answer_work',
  'assign_work',
  'await_work',
  'cancel_work',
  'check_work',
  'escalate',
  'get_agent_schema',
  'list_available_agents',
];

const { values: options, positionals: only } = parseArgs({
  allowPositionals: true,
  options: {
    sdk: { type: 'string', default: 'client' },
    mode: { type: 'string', default: 'legacy' },
    url: { type: 'string' },
    stdio: { type: 'string' },
    token: { type: 'string' },
    agents: { type: 'string' },
    timeout: { type: 'string', default: '30' },
  },
});

function check(condition, what, seen) {
  if (!condition) throw new Error(seen === undefined ? what : `${what}; saw ${JSON.stringify(seen)?.slice(0, 2000)}`);
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** A queue whose reader waits. */
function queue() {
  const values = [];
  let wake = () => {};
  return {
    push: (value) => {
      values.push(value);
      wake();
    },
    next: async () => {
      while (values.length === 0) await new Promise((resolve) => (wake = resolve));
      return values.shift();
    },
  };
}

/** The forms that a person was shown, and what they say. */
const forms = { shown: [], says: { action: 'cancel' } };
const capabilities = { elicitation: { form: {} } };
const show = ({ params }) => {
  forms.shown.push(params);
  return forms.says;
};

class Lattice {
  constructor(client, protocol, onNotification) {
    this.client = client;
    this.protocol = protocol;
    this.modern = protocol >= '2026';
    this.onNotification = onNotification;
  }

  /** Calls a tool that must succeed; its structured content. */
  async call(tool, args = {}, onprogress) {
    const result = await this.callRaw(tool, args, onprogress);
    check(!result.isError, `${tool} failed`, result);
    check(result.structuredContent, `${tool} gave no structured content`, result);
    const text = JSON.parse(result.content[0].text);
    check(isDeepStrictEqual(text, result.structuredContent), `${tool}: the text is not the structured content`, result);
    return text;
  }

  callRaw(name, args, onprogress) {
    const request = onprogress ? { onprogress, resetTimeoutOnProgress: true } : {};
    return options.sdk === 'sdk'
      ? this.client.callTool({ name, arguments: args }, undefined, request)
      : this.client.callTool({ name, arguments: args }, request);
  }

  async tools() {
    const { tools } = await this.client.listTools();
    return Object.fromEntries(tools.map((tool) => [tool.name, tool]));
  }

  /** The works after their end. */
  async settled(ids, onprogress) {
    for (;;) {
      const { works } = await this.call('await_work', { work_ids: ids }, onprogress);
      check(isDeepStrictEqual(works.map((work) => work.work_id), ids), 'works come back in another order', works);
      if (works.every((work) => ['COMPLETE', 'FAILED', 'CANCELLED', 'ESCALATED'].includes(work.status))) return works;
    }
  }

  /** Does something, and takes the notifications that come then until one of them tells what is awaited. */
  async hears(method, filter, act, isAwaited) {
    const heard = queue();
    this.onNotification(method, heard.push);
    const subscription = this.modern ? await this.client.listen(filter) : undefined;
    await act();
    while (!(await isAwaited(await heard.next())));
    await subscription?.close();
  }
}

const scenarios = {
  async tools(lattice) {
    const listed = await lattice.tools();
    check(isDeepStrictEqual(Object.keys(listed).sort(), TOOLS), 'other tools than the eight', Object.keys(listed));
    for (const [name, tool] of Object.entries(listed)) {
      for (const field of ['title', 'description', 'inputSchema', 'outputSchema', 'annotations']) {
        check(tool[field], `${name} has no ${field}`, tool);
      }
    }
    for (const agent of ['upper', 'slow', 'asker']) {
      check(listed.assign_work.description.includes(`**${agent}**`), `assign_work does not describe ${agent}`, listed.assign_work);
    }
    const { agents } = await lattice.call('list_available_agents');
    const names = agents.map((agent) => agent.name);
    check(['upper', 'slow', 'asker'].every((name) => names.includes(name)), 'agents are missing', agents);
    check((await lattice.call('get_agent_schema', { agent_name: 'upper' })).name === 'upper', 'no schema of upper');
  },

  async assign(lattice) {
    const assign = (task) => lattice.call('assign_work', { agent_name: 'upper', task });
    const assigned = await Promise.all(['hello', 'there'].map(assign));
    check(assigned.every(({ status }) => status === 'ASSIGNED'), 'not assigned', assigned);
    const ids = assigned.map(({ work_id }) => work_id);
    const done = await lattice.settled(ids);
    check(done.every(({ status }) => status === 'COMPLETE'), 'upper did not do its work', done);
    check(isDeepStrictEqual(done.map(({ result }) => result), ['HELLO', 'THERE']), 'upper did something else', done);
    check(isDeepStrictEqual(await lattice.settled(ids), done), 'awaiting again gives something else');
    const checked = await lattice.call('check_work', { work_id: ids[0] });
    check(checked.status === 'COMPLETE' && checked.result === 'HELLO', 'check_work sees it otherwise', checked);
  },

  async progress(lattice) {
    const { work_id } = await lattice.call('assign_work', { agent_name: 'slow', task: '5' });
    const heard = [];
    const [slow] = await lattice.settled([work_id], (update) => heard.push(update.progress));
    check(slow.status === 'COMPLETE' && slow.result.steps === 5, 'slow did not do its work', slow);
    check(heard.length > 0, 'no progress arrived');
    check(heard.every((value, at) => at === 0 || value > heard[at - 1]), 'progress does not rise', heard);
  },

  async cancel(lattice) {
    const { work_id } = await lattice.call('assign_work', { agent_name: 'slow', task: '600' });
    while ((await lattice.call('check_work', { work_id })).status !== 'ACCEPTED') await sleep(20);
    const cancelled = await lattice.call('cancel_work', { work_id, reason: 'not needed' });
    check(cancelled.status === 'CANCELLED', 'not cancelled', cancelled);
    check((await lattice.call('check_work', { work_id })).status === 'CANCELLED', 'not cancelled for good');
  },

  async escalate(lattice) {
    const { work_id } = await lattice.call('assign_work', { agent_name: 'asker', task: 'paint' });
    const [asking] = await lattice.settled([work_id]);
    check(asking.status === 'ESCALATED', 'did not escalate', asking);
    check(asking.question.reason.includes('which colour'), 'no question', asking);
    await lattice.call('answer_work', { work_id, answer: 'blue' });
    const [done] = await lattice.settled([work_id]);
    check(done.status === 'COMPLETE' && JSON.stringify(done.result).includes('blue'), 'the answer did not arrive', done);
  },

  async person(lattice) {
    forms.says = { action: 'accept', content: { answer: 'yes' } };
    const assign = async () => (await lattice.call('assign_work', { agent_name: 'careful', task: 'act' })).work_id;
    const [done] = await lattice.settled([await assign()]);
    check(done.status === 'COMPLETE' && JSON.stringify(done.result).includes('yes'), "the person's answer did not arrive", done);
    const [form] = forms.shown;
    check(form.message.includes('careful') && form.message.includes('may I?'), 'the form does not show who asks what', form);
    check(isDeepStrictEqual(form.requestedSchema.properties.answer.enum, ['yes', 'no']), 'the form offers no choice', form);

    forms.says = { action: 'decline' };
    const work_id = await assign();
    const [asking] = await lattice.settled([work_id]);
    check(asking.status === 'ESCALATED', 'declining is taken for an answer', asking);
    check(forms.shown.length === 2, 'the form was shown again and again', forms.shown);
    const refused = await lattice.callRaw('answer_work', { work_id, answer: 'yes' });
    check(refused.isError, 'a model answered for a person', refused);
    forms.says = { action: 'accept', content: { answer: 'no' } };
    await lattice.call('answer_work', { work_id, answer: 'yes' });
    const [last] = await lattice.settled([work_id]);
    const said = JSON.stringify(last.result);
    check(said.includes('no') && !said.includes('yes'), 'not what the person said', last);
  },

  async lost(lattice) {
    const { work_id } = await lattice.call('assign_work', { agent_name: 'careful', task: 'act' });
    while ((await lattice.call('check_work', { work_id })).status !== 'ESCALATED') await sleep(20);
    const seen = await lattice.call('check_work');
    check(JSON.stringify(seen).length < 1600, 'what is outstanding is too much', seen);
    const asking = seen.works.map((work) => [work.work_id, work.question]);
    check(isDeepStrictEqual(asking, [[work_id, 'may I?']]), 'the question is not seen', seen);
    check(seen.settled_since_last_look >= 1 && seen.settled_last[0].new, 'what settled is not seen', seen);
    const again = await lattice.call('check_work');
    check(again.settled_since_last_look === 0, 'what was told is told as new again', again);
    await lattice.call('cancel_work', { work_id });
  },

  async unknown(lattice) {
    const result = await lattice.callRaw('assign_work', { agent_name: 'uper', task: 'hello' });
    check(result.isError, 'an unknown agent is no error', result);
    const [{ text }] = result.content;
    check(['uper', 'upper', 'slow'].every((name) => text.includes(name)), 'the error does not list the agents', text);
  },

  async changes(lattice) {
    const appear = () => {
      const upper = readFileSync(join(options.agents, 'upper.md'), 'utf8');
      const fresh = join(options.agents, '.late');
      writeFileSync(fresh, upper.replace('name: upper', 'name: late').replace('upper case', 'UPPER CASE, but late'));
      renameSync(fresh, join(options.agents, 'late.md'));
    };
    const isDescribed = async () => (await lattice.tools()).assign_work.description.includes('**late**');
    check(!(await isDescribed()), 'the new agent is described before it exists');
    await lattice.hears('notifications/tools/list_changed', { toolsListChanged: true }, appear, isDescribed);
    const { work_id } = await lattice.call('assign_work', { agent_name: 'late', task: 'new' });
    const [done] = await lattice.settled([work_id]);
    check(done.result === 'NEW', 'the new agent does not work', done);
  },

  async resources(lattice) {
    const { client } = lattice;
    const { work_id } = await lattice.call('assign_work', { agent_name: 'upper', task: 'read me' });
    await lattice.settled([work_id]);
    const { resources } = await client.listResources();
    check(resources.some(({ uri }) => uri === 'agent://upper'), 'agents are no resources', resources);
    const { resourceTemplates } = await client.listResourceTemplates();
    const shapes = resourceTemplates.map(({ uriTemplate }) => uriTemplate);
    check(['agent://{name}', 'work://{id}'].every((shape) => shapes.includes(shape)), 'templates are missing', shapes);
    const read = async (uri) => (await client.readResource({ uri })).contents[0].text;
    check(JSON.parse(await read('agent://upper')).name === 'upper', 'agent://upper is something else');
    check(JSON.parse(await read(`work://${work_id}`)).status === 'COMPLETE', "the work's resource is behind");
    check((await read(`work://${work_id}/result`)).includes('READ ME'), "the result's resource is something else");
    const ref = { type: 'ref/resource', uri: 'agent://{name}' };
    const { completion } = await client.complete({ ref, argument: { name: 'name', value: 'up' } });
    check(isDeepStrictEqual(completion.values, ['upper']), 'no completion of agents', completion);
    const error = await read('agent://nobody').then(() => undefined, (error) => error);
    check(error, 'a resource that does not exist was read');
    check(String(error).includes('nobody'), 'the error does not name what is missing', String(error));
  },

  async prompts({ client }) {
    const { prompts } = await client.listPrompts();
    const names = prompts.map(({ name }) => name);
    check(['orchestrate', 'delegate'].every((name) => names.includes(name)), 'prompts are missing', names);
    const filled = await client.getPrompt({ name: 'delegate', arguments: { goal: 'paint the fence' } });
    check(JSON.stringify(filled.messages).includes('paint the fence'), 'the goal is not in the prompt', filled);
  },

  async subscription(lattice) {
    const { work_id } = await lattice.call('assign_work', { agent_name: 'asker', task: 'paint' });
    await lattice.settled([work_id]);
    const uri = `work://${work_id}`;
    if (!lattice.modern) await lattice.client.subscribeResource({ uri });
    const answer = () => lattice.call('answer_work', { work_id, answer: 'green' });
    await lattice.hears('notifications/resources/updated', { resourceSubscriptions: [uri] }, answer, (updated) => updated.uri === uri);
    if (!lattice.modern) await lattice.client.unsubscribeResource({ uri });
    await lattice.settled([work_id]);
  },
};

async function connect() {
  const info = { name: 'lattice-test', version: '1.0.0' };
  const [command, ...args] = options.stdio ? JSON.parse(options.stdio) : [];
  const process_ = { command, args, env: { ...process.env }, stderr: 'inherit' };
  const requestInit = options.token ? { headers: { Authorization: `Bearer ${options.token}` } } : undefined;
  if (options.sdk === 'client') {
    const { Client, StreamableHTTPClientTransport } = await import('@modelcontextprotocol/client');
    const { StdioClientTransport } = await import('@modelcontextprotocol/client/stdio');
    const mode = ['legacy', 'auto'].includes(options.mode) ? options.mode : { pin: options.mode };
    const client = new Client(info, { capabilities, versionNegotiation: { mode } });
    client.setRequestHandler('elicitation/create', show);
    const transport = options.url
      ? new StreamableHTTPClientTransport(new URL(options.url), { requestInit })
      : new StdioClientTransport(process_);
    await client.connect(transport);
    const on = (method, handle) => client.setNotificationHandler(method, ({ params }) => handle(params));
    return new Lattice(client, client.getNegotiatedProtocolVersion(), on);
  }
  const { Client } = await import('@modelcontextprotocol/sdk/client/index.js');
  const { StdioClientTransport } = await import('@modelcontextprotocol/sdk/client/stdio.js');
  const { StreamableHTTPClientTransport } = await import('@modelcontextprotocol/sdk/client/streamableHttp.js');
  const types = await import('@modelcontextprotocol/sdk/types.js');
  const schemas = {
    'notifications/tools/list_changed': types.ToolListChangedNotificationSchema,
    'notifications/resources/updated': types.ResourceUpdatedNotificationSchema,
  };
  const client = new Client(info, { capabilities });
  client.setRequestHandler(types.ElicitRequestSchema, show);
  const transport = options.url
    ? new StreamableHTTPClientTransport(new URL(options.url), { requestInit })
    : new StdioClientTransport(process_);
  let protocol;
  const told = transport.setProtocolVersion?.bind(transport);
  transport.setProtocolVersion = (version) => {
    protocol = version;
    told?.(version);
  };
  await client.connect(transport);
  const on = (method, handle) => client.setNotificationHandler(schemas[method], ({ params }) => handle(params));
  return new Lattice(client, protocol ?? types.LATEST_PROTOCOL_VERSION, on);
}

async function within(seconds, name, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`did not end within ${seconds} s`)), seconds * 1000);
  });
  try {
    return await Promise.race([promise, late]);
  } catch (error) {
    throw new Error(`scenario ${name}: ${error.message}`, { cause: error });
  } finally {
    clearTimeout(timer);
  }
}

try {
  if (!options.agents || !options.url === !options.stdio) throw new Error('give --agents, and one of --url and --stdio');
  const lattice = await within(Number(options.timeout), 'connect', connect());
  const installed = JSON.parse(readFileSync(new URL(`node_modules/@modelcontextprotocol/${options.sdk}/package.json`, import.meta.url)));
  const client = `TypeScript \`${options.sdk}\` ${installed.version}`;
  const report = { client, protocol: lattice.protocol, passed: [], unable: {} };
  for (const [name, scenario] of Object.entries(scenarios)) {
    if (only.length > 0 && !only.includes(name)) continue;
    await within(Number(options.timeout), name, scenario(lattice));
    report.passed.push(name);
  }
  await lattice.client.close();
  console.log(JSON.stringify(report));
  process.exit(0);
} catch (error) {
  console.error(error);
  console.error(`FAILED: ${error.message}`);
  process.exit(1);
}
