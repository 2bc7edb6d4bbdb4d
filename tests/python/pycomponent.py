"""Runs a component with `wasmtime` as it comes from PyPI; the host functions are Python.

It knows nothing of Wasmscope. At the end it prints one line of JSON in the shape that `workload` prints, with exact
counts of what it did, each counted at the point of doing.
"""

import argparse
import json
import os
import pathlib
import sys
import threading
import time

from pywasm import Counts, at_least
from wasmtime import Engine, Store
from wasmtime.component import Component, Linker

GUEST = pathlib.Path(__file__).parent.parent / "guests" / "component.wat"
CLOCK = "wasi:clocks/monotonic-clock@0.2.6"
OPERATIONS = "test:host/ops@1.0.0"
STORE = "test:host/store@1.0.0"
RUNNER = "test:guest/runner@1.0.0"


def link(engine, counts, output):
    """A linker with the host functions."""

    def now(_store):
        counts.host_calls[f"{CLOCK}.now"] += 1
        return time.monotonic_ns()

    def add(_store, left, right):
        counts.host_calls[f"{OPERATIONS}.add"] += 1
        return (left + right) & 0xFFFFFFFF

    def nap(_store):
        counts.host_calls[f"{OPERATIONS}.nap"] += 1

    def fail(_store):
        raise RuntimeError("nobody calls this")

    def write(_store, data):
        counts.host_calls[f"{STORE}.write"] += 1
        counts.syscall(f"{STORE}.write", "write")
        return os.write(output, bytes(data))

    def read(_store, length):
        counts.host_calls[f"{STORE}.read"] += 1
        counts.syscall(f"{STORE}.read", "openat")
        file = os.open("/dev/zero", os.O_RDONLY)
        counts.syscall(f"{STORE}.read", "pread64")
        data = os.pread(file, length, 0)
        counts.syscall(f"{STORE}.read", "close")
        os.close(file)
        # The runtime asks the guest for the memory that the bytes go to.
        counts.invocations["libc/cabi_realloc"] += 1
        return data

    linker = Linker(engine)
    with linker.root() as root:
        for interface, functions in [(CLOCK, [now]), (OPERATIONS, [add, nap, fail]), (STORE, [write, read])]:
            with root.add_instance(interface) as instance:
                for function in functions:
                    instance.add_func(function.__name__, function)
    return linker


def run_task(engine, component, options, counts):
    """One store and instance, and all invocations in it."""
    output = os.open("/dev/null", os.O_WRONLY | os.O_APPEND)
    store = Store(engine)
    instance = link(engine, counts, output).instantiate(store, component)
    runner = instance.get_export_index(store, RUNNER)
    start = instance.get_func(store, instance.get_export_index(store, "start", runner))
    for _ in range(options.repeat):
        counts.invocations[f"main/{RUNNER}#start"] += 1
        start(store, options.calls)
    greet = instance.get_func(store, instance.get_export_index(store, "greet"))
    for function in ["libc/cabi_realloc", "main/greet", "main/cabi_post_greet"]:
        counts.invocations[function] += 1
    if greet(store, "component") != "component":
        raise RuntimeError("the guest did not give back what it was given")
    os.close(output)


def run(options):
    """Runs all tasks, each on a thread of its own, and returns the report."""
    engine = Engine()
    component = Component(engine, GUEST.read_text(encoding="utf-8"))
    if options.wait:
        print("ready", flush=True)
        if not sys.stdin.readline():
            raise RuntimeError("stdin ended before the line that starts the run (--wait)")

    per_task = [Counts() for _ in range(options.tasks)]
    failures = []

    def guarded(counts):
        try:
            run_task(engine, component, options, counts)
        except BaseException as error:  # noqa: BLE001 (handed to the main thread)
            failures.append(error)

    start = time.monotonic_ns()
    threads = [threading.Thread(target=guarded, args=(counts,)) for counts in per_task]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic_ns() - start
    if failures:
        raise failures[0]

    total = Counts()
    for counts in per_task:
        total.add(counts)
    return {"scenario": "pycomponent", "mode": "sync", "elapsed_ns": elapsed, **total.report()}


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=at_least(0), default=10, help="host calls of each kind in one invocation")
    parser.add_argument("--repeat", type=at_least(1), default=1, help="invocations by each task")
    parser.add_argument("--tasks", type=at_least(1), default=1, help="stores, each with a thread of its own")
    parser.add_argument("--wait", action="store_true", help="print `ready` and wait for a line before the first instance")
    print(json.dumps(run(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
