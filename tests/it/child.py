# Assigns, awaits and escalates.
assigned = call("assign_work", agent_name="upper", task="from below")
settled = call("await_work", work_id=assigned["work_id"])
settled = settled.get("works", [settled])[0]
answer = call("escalate", reason="may I?")
leave({"child_run": assigned["run_id"], "child_result": settled["result"], "answer": answer["answer"]})
