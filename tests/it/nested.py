# Makes the calls that its task lists, and gives what came of them.
# The task is JSON: {"calls": [[tool, arguments], ...], "repeat": until refused, "stay": do not end}. "$WORK" in it is its own work.
task = json.loads(os.environ["LATTICE_TASK"].replace("$WORK", os.environ["LATTICE_WORK_ID"]))
answers = []
while True:
    for tool, arguments in task["calls"]:
        answer = call(tool, **arguments)
        answers.append(answer)
        with open("answers", "a") as file:
            file.write(json.dumps(answer) + "\n")
    if not task.get("repeat") or "refused" in answers[-1]:
        break
if task.get("stay"):
    time.sleep(300)
leave(answers)
