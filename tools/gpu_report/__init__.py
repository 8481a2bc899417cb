"""What one GPU does with this library, found within a few minutes: right or wrong, how fast, and what probes want to know.

    make gpu-report ARGS='--minutes 8 --out DIR'     # or: python tools/gpu_report --minutes 8 --out DIR
    python tools/gpu_report --dry-run                # the steps in order, with their times; needs no GPU
    python tools/gpu_report --out DIR --place PAGE   # puts the tables of DIR into a page, between <!-- gpu-report:NAME -->

It builds for the one GPU that it finds, with this interpreter's torch and the machine's own toolkit, into DIR/build. It fetches
nothing. Then come steps, what matters most first, each in a process of its own with a time of its own (`steps`, `runner`). A
step that dies, hangs or runs over its time is noted with its last lines, and the next one runs. Called again with the same DIR,
it keeps what is there: steps that came to their end do not run again, others go on behind the cases that they finished.

DIR/report.json is flat:
    about    facts by name: gpu, capability, torch, cuda, nvcc, driver, revision, command, began, ...
    steps    one object per step: name, question, status, seconds, limit, why, last (its last lines, if it did not end well).
             status is ok, part (out of time, some cases are left), over time, failed, broken (a line is no JSON), no time,
             left out (a step that it needs did not end well)
    records  one object per finding, in order: step, case, and whatever the step says of it. `wrong` says that bits or a promise
             do not hold; `error` that something could not run. Times: who, ours, backend, mode, way (null: its own choice),
             ms (inside the device; of a model from Python), call_ms (from Python), tflops, gbs
DIR/report.html is the same for people, in one file. DIR/STEP.jsonl is what each step printed, DIR/STEP.log its errors.

`work/` is what the processes of the steps run. A probe is a file in tools/probes: `runner` finds it there, its docstring begins
with the question, SECONDS is the time that it wants, and it prints one line of JSON.
"""
