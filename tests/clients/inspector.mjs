// Drives a lattice through the Inspector's command line, one process per call, and prints what it saw as one JSON report.
//
// Every call is a connection of its own: over stdio also a server of its own, on the same data. Exits with 1 and a readable message
// when a scenario fails; the report tells what this client has no way to do, and why.
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { isDeepStrictEqual, parseArgs, promisify } from 'node:util';

const { values: options } = parseArgs({
  options: {
    mode: { type: 'string', default: 'legacy' },
    url: { type: 'string' },
    stdio: { type: 'string' },
    token: { type: 'string' },
    agents: { type: 'string' },
    timeout: { type: 'string', default: '30' },
  },
});

const home = new URL('node_modules/@modelcontextprotocol/inspector/', import.meta.url);
const program = new URL('clients/launcher/build/index.js', home).pathname;
const server = options.url
  ? [options.url, '--transport', 'http', '--header', `Authorization: Bearer ${options.token}`]
  : JSON.parse(options.stdio);

class Unable extends Error {}

function check(condition, what, seen) {
  if (!condition) throw new Error(seen === undefined ? what : `${what}; saw ${JSON.stringify(seen)?.slice(0, 2000)}`);
}

const run = promisify(execFile);

/** Runs the Inspector once; what it printed on both streams, and its exit code. */
async function inspect(...method) {
  const args = [program, '--cli', ...server, '--protocol-era', options.mode, '--method', ...method];
  const settings = { timeout: Number(options.timeout) * 1000, maxBuffer: 1 << 26, env: { ...process.env, HOME: process.cwd() } };
  try {
    return { ...(await run(process.execPath, args, settings)), code: 0 };
  } catch (error) {
    if (typeof error.code !== 'number') throw error;
    return error;
  }
}

/** What the Inspector printed of a request that must succeed. */
async function ask(...method) {
  const { code, stdout, stderr } = await inspect(...method);
  check(code === 0, `${method.join(' ')} ended with ${code}`, stderr + stdout);
  return JSON.parse(stdout);
}

const tool = (name, args = {}) => ['tools/call', '--tool-name', name, '--tool-args-json', JSON.stringify(args)];

/** Calls a tool that must succeed; its structured content. */
async function call(name, args) {
  const { structuredContent, content } = await ask(...tool(name, args));
  check(isDeepStrictEqual(JSON.parse(content[0].text), structuredContent), `${name}: the text is not the structured content`, content);
  return structuredContent;
}

/** The works after their end. */
async function settled(ids) {
  for (;;) {
    const { works } = await call('await_work', { work_ids: ids });
    if (works.every((work) => ['COMPLETE', 'FAILED', 'CANCELLED', 'ESCALATED'].includes(work.status))) return works;
  }
}

const assign = async (agent_name, task) => (await call('assign_work', { agent_name, task })).work_id;

const scenarios = {
  async tools() {
    // --strict tells of schemas that a client or a model might trip over, and fails when one is an error.
    const { code, stdout, stderr } = await inspect('tools/list', '--strict');
    check(code === 0 && /\b0 errors\b/.test(stderr), 'the schemas are not portable', stderr);
    const { tools } = JSON.parse(stdout);
    check(tools.length === 8, 'other tools than the eight', tools.map(({ name }) => name));
    const { description } = tools.find(({ name }) => name === 'assign_work');
    check(['upper', 'slow', 'asker'].every((agent) => description.includes(`**${agent}**`)), 'agents are not described', description);
  },

  async assign() {
    const ids = await Promise.all(['hello', 'there'].map((task) => assign('upper', task)));
    const done = await settled(ids);
    check(isDeepStrictEqual(done.map(({ status, result }) => [status, result]), [['COMPLETE', 'HELLO'], ['COMPLETE', 'THERE']]), 'not done', done);
    check(isDeepStrictEqual(await settled(ids), done), 'awaiting again gives something else');
  },

  async progress() {
    const { stdout, stderr } = await inspect(...tool('await_work', { work_id: await assign('slow', '3') }));
    check(JSON.parse(stdout).structuredContent.result.steps === 3, 'slow did not do its work', stdout);
    check(!/progress|step 2/i.test(stderr), 'it shows progress now: have this scenario check it', stderr);
    throw new Unable('it prints results only, no progress');
  },

  async cancel() {
    const work_id = await assign('slow', '600');
    const cancelled = await call('cancel_work', { work_id, reason: 'not needed' });
    check(cancelled.status === 'CANCELLED', 'not cancelled', cancelled);
    check((await call('check_work', { work_id })).status === 'CANCELLED', 'not cancelled for good');
  },

  async escalate() {
    const work_id = await assign('asker', 'paint');
    const [asking] = await settled([work_id]);
    check(asking.status === 'ESCALATED' && asking.question.reason.includes('which colour'), 'no question', asking);
    await call('answer_work', { work_id, answer: 'blue' });
    const [done] = await settled([work_id]);
    check(done.status === 'COMPLETE' && JSON.stringify(done.result).includes('blue'), 'the answer did not arrive', done);
  },

  async person() {
    const work_id = await assign('careful', 'act');
    const [asking] = await settled([work_id]);
    check(asking.status === 'ESCALATED' && asking.question.reason.includes('may I?'), 'no question', asking);
    await call('cancel_work', { work_id });
    throw new Unable('it shows no form');
  },

  async unknown() {
    const { code, stdout } = await inspect(...tool('assign_work', { agent_name: 'uper', task: 'hello' }));
    check(code === 5, 'an unknown agent is no error', { code, stdout });
    check(['uper', 'upper', 'slow'].every((name) => stdout.includes(name)), 'the error does not list the agents', stdout);
  },

  async changes() {
    throw new Unable('a call is a connection of its own, so nothing is heard between two');
  },

  async resources() {
    const { resources } = await ask('resources/list');
    check(resources.some(({ uri }) => uri === 'agent://upper'), 'agents are no resources', resources);
    const { contents } = await ask('resources/read', '--uri', 'agent://upper');
    check(JSON.parse(contents[0].text).name === 'upper', 'agent://upper is something else', contents);
  },

  async prompts() {
    const { prompts } = await ask('prompts/list');
    check(prompts.some(({ name }) => name === 'delegate'), 'prompts are missing', prompts);
    const filled = await ask('prompts/get', '--prompt-name', 'delegate', '--prompt-args', 'goal=paint the fence');
    check(JSON.stringify(filled.messages).includes('paint the fence'), 'the goal is not in the prompt', filled);
  },

  async subscription() {
    throw new Unable('a call is a connection of its own, so nothing is heard between two');
  },
};

try {
  const { version } = JSON.parse(readFileSync(new URL('package.json', home)));
  const { protocolVersion: protocol } = await ask('initialize');
  const report = { client: `Inspector CLI ${version}`, protocol, passed: [], unable: {} };
  for (const [name, scenario] of Object.entries(scenarios)) {
    try {
      await scenario();
      report.passed.push(name);
    } catch (error) {
      if (!(error instanceof Unable)) throw new Error(`scenario ${name}: ${error.message}`, { cause: error });
      report.unable[name] = error.message;
    }
  }
  console.log(JSON.stringify(report));
} catch (error) {
  console.error(error);
  console.error(`FAILED: ${error.message}`);
  process.exit(1);
}
