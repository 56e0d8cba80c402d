# Assigns what its task lists, [agent, task] each, one after the other; gives what came of each.
came = []
for agent, task in json.loads(os.environ["LATTICE_TASK"]):
    assigned = call("assign_work", agent_name=agent, task=task if isinstance(task, str) else json.dumps(task))
    if "work_id" in assigned:
        settled = call("await_work", work_id=assigned["work_id"], timeout="60s")
        assigned = settled.get("works", [settled])[0]
    came.append(assigned)
leave(came)
