"""Runs a guest with `wasmtime` as it comes from PyPI; the host functions are Python.

It knows nothing of Wasmscope. At the end it prints one line of JSON in the shape that `workload` prints, with exact
counts of what it did, each counted at the point of doing.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter

from wasmtime import Engine, FuncType, Linker, Module, Store, Trap, ValType, WasmtimeError

GUEST = """
;; Calls each of three host functions `count` times, each from three frames deep: start -> loop_emit -> emit.
(module $pyguest
  (import "host" "add" (func $host_add (param i32 i32) (result i32)))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (import "host" "read_file" (func $host_read_file (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "one line of text\\n")

  (func $emit (param $round i32) (result i32)
    (local $sum i32)
    (local.set $sum (call $host_add (local.get $round) (i32.const 1)))
    (local.set $sum (i32.add (local.get $sum) (call $host_write (i32.const 0) (i32.const 17))))
    (i32.add (local.get $sum) (call $host_read_file (i32.const 1024) (i32.const 256))))

  (func $loop_emit (param $count i32) (result i32)
    (local $round i32)
    (local $sum i32)
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $round) (local.get $count)))
        (local.set $sum (i32.add (local.get $sum) (call $emit (local.get $round))))
        (local.set $round (i32.add (local.get $round) (i32.const 1)))
        (br $next)))
    (local.get $sum))

  (func $start (export "start") (param $count i32) (result i32)
    (i32.add (call $loop_emit (local.get $count)) (i32.const 0)))

  (func $parse_rule (param $pointer i32) (result i32) (i32.load (local.get $pointer)))
  (func $fault (export "fault") (drop (call $parse_rule (i32.const 0x7fff0000))))
)
"""


class Counts:
    """Totals of one thread; threads are added up when they are done, so that none waits for another while it runs."""

    def __init__(self):
        self.invocations = Counter()
        self.host_calls = Counter()
        self.syscalls = {}
        self.traps = Counter()

    def syscall(self, host_call, name):
        """Counts the syscall `name`, which the caller makes next, in the host function `host_call`."""
        self.syscalls.setdefault(host_call, Counter())[name] += 1

    def add(self, other):
        """Takes over the counts of `other`."""
        self.invocations.update(other.invocations)
        self.host_calls.update(other.host_calls)
        self.traps.update(other.traps)
        for host_call, syscalls in other.syscalls.items():
            self.syscalls.setdefault(host_call, Counter()).update(syscalls)

    def report(self):
        """All of it, for printing."""
        syscalls = sum(self.syscalls.values(), Counter())
        return {
            "invocations": self.invocations,
            "host_calls": self.host_calls,
            "syscalls": syscalls,
            "syscalls_by_host_call": self.syscalls,
            "traps": self.traps,
            "suspends": 0,
            "resumes": 0,
            "moves": 0,
        }


def link(engine, counts, memory, output):
    """A linker with the host functions; `memory` is a list that will hold the guest's memory and its store."""

    def add(left, right):
        counts.host_calls["host.add"] += 1
        return (left + right) & 0x7FFFFFFF

    def write(pointer, length):
        counts.host_calls["host.write"] += 1
        guest_memory, store = memory
        line = guest_memory.read(store, pointer, pointer + length)
        counts.syscall("host.write", "write")
        return os.write(output, line)

    def read_file(pointer, length):
        counts.host_calls["host.read_file"] += 1
        guest_memory, store = memory
        counts.syscall("host.read_file", "openat")
        file = os.open("/dev/zero", os.O_RDONLY)
        counts.syscall("host.read_file", "pread64")
        data = os.pread(file, length, 0)
        counts.syscall("host.read_file", "close")
        os.close(file)
        guest_memory.write(store, data, pointer)
        return len(data)

    integer = ValType.i32()
    linker = Linker(engine)
    binary = FuncType([integer, integer], [integer])
    linker.define_func("host", "add", binary, add)
    linker.define_func("host", "write", binary, write)
    linker.define_func("host", "read_file", binary, read_file)
    return linker


def run_task(engine, module, options, counts):
    """One store and instance, and all invocations in it."""
    output = os.open(options.output, os.O_WRONLY | os.O_APPEND)
    memory = []
    store = Store(engine)
    instance = link(engine, counts, memory, output).instantiate(store, module)
    exports = instance.exports(store)
    memory += [exports["memory"], store]
    for _ in range(options.repeat):
        counts.invocations["pyguest/start"] += 1
        exports["start"](store, options.calls)
        if options.trap:
            counts.invocations["pyguest/fault"] += 1
            try:
                exports["fault"](store)
            except Trap:
                counts.traps["memory_out_of_bounds"] += 1
            else:
                raise RuntimeError("the guest's fault did not trap")
    os.close(output)


def run(options):
    """Runs all tasks, each on a thread of its own, and returns the report."""
    engine = Engine()
    module = None
    if options.wait:
        if not options.compile_after_wait:
            module = Module(engine, GUEST)
        print("ready", flush=True)
        if not sys.stdin.readline():
            raise RuntimeError("stdin ended before the line that starts the run (--wait)")
    module = module or Module(engine, GUEST)

    per_task = [Counts() for _ in range(options.tasks)]
    failures = []

    def guarded(counts):
        try:
            run_task(engine, module, options, counts)
        except BaseException as error:  # noqa: BLE001 (handed to the main thread)
            failures.append(error)

    start = time.monotonic_ns()
    if options.tasks == 1:
        run_task(engine, module, options, per_task[0])
    else:
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
    return {"scenario": "pywasm", "mode": "sync", "elapsed_ns": elapsed, **total.report()}


def at_least(minimum):
    """A converter for the command line that takes numbers from `minimum` on."""

    def number(text):
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return value

    return number


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=at_least(0), default=10,
                        help="host calls of each kind per invocation (default: 10)")
    parser.add_argument("--repeat", type=at_least(1), default=1, help="invocations by each task (default: 1)")
    parser.add_argument("--tasks", type=at_least(1), default=1, help="threads, each with its own store (default: 1)")
    parser.add_argument("--trap", action="store_true", help="let the guest trap once after each invocation")
    parser.add_argument("--wait", action="store_true", help="print `ready`, wait for a line on stdin, then run")
    parser.add_argument("--compile-after-wait", action="store_true", help="compile the guest after that line")
    parser.add_argument("--hold", action="store_true", help="after printing, wait for a line or the end of stdin")
    parser.add_argument("--output", default="/dev/null", help="file that host.write writes to (default: /dev/null)")
    options = parser.parse_args()
    try:
        report = run(options)
    except (OSError, RuntimeError, WasmtimeError, Trap) as error:
        print(f"pywasm: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report), flush=True)
    if options.hold:
        sys.stdin.readline()
    return 0


if __name__ == "__main__":
    sys.exit(main())
