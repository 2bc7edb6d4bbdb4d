"""Runs a guest with `wasmtime` as it comes from PyPI, or with several copies of it at once; the host functions are Python.

It knows nothing of Wasmscope. At the end it prints one line of JSON in the shape that `workload` prints, with exact
counts of what it did, each counted at the point of doing.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import mmap
import os
import re
import select
import sys
import tempfile
import threading
import time
from collections import Counter

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

  ;; Comes and goes without calling anything.
  (func $quick (export "quick") (param $value i32) (result i32) (local.get $value))

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


class RenamedSource(importlib.machinery.SourceFileLoader):
    """Reads modules of `wasmtime` that go by another name, which is the only way to have several of them."""

    def __init__(self, fullname, path, alias):
        super().__init__(fullname, path)
        self.alias = alias

    def get_data(self, path):
        """The source, with its own name in it changed."""
        source = super().get_data(path).decode()
        return re.sub(r"\b(from|import) wasmtime\b", rf"\1 {self.alias}", source).encode()

    def path_stats(self, path):
        """No byte code of the original is to be used."""
        raise OSError(f"{path} is not cached")


class Renamed(importlib.abc.MetaPathFinder):
    """Finds the package in a directory under another name."""

    def __init__(self, alias, directory):
        self.alias = alias
        self.directory = directory

    def find_spec(self, fullname, path=None, target=None):
        """The module's file, or that of the package."""
        parts = fullname.split(".")
        if parts[0] != self.alias:
            return None
        file = os.path.join(self.directory, "wasmtime", *parts[1:])
        is_package = os.path.isdir(file)
        file = os.path.join(file, "__init__.py") if is_package else f"{file}.py"
        if not os.path.isfile(file):
            return None
        loader = RenamedSource(fullname, file, self.alias)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


class Runtime:
    """One copy of wasmtime, with the guest compiled for it."""

    def __init__(self, directory, name):
        self.directory = directory
        self.name = name
        self.module = None
        self.inner = None

    def load(self):
        """Imports the copy in the runtime's directory, or the one that is installed."""
        if self.directory is None:
            self.api = importlib.import_module("wasmtime")
        else:
            alias = f"wasmtime_of_{self.name}"
            sys.meta_path.insert(0, Renamed(alias, self.directory))
            self.api = importlib.import_module(alias)

    def compile(self):
        """Compiles the guest."""
        self.engine = self.api.Engine()
        self.module = self.api.Module(self.engine, GUEST.replace("$pyguest", f"${self.name}"))

    def warm_up(self):
        """Runs a guest of another name, which nobody counts, once."""
        engine = self.api.Engine()
        module = self.api.Module(engine, GUEST.replace("$pyguest", f"$warm_{self.name}"))
        options = argparse.Namespace(calls=1, output="/dev/null")
        task = Task(Runtime(None, "uncounted"), options, Counts())
        task.runtime.api, task.runtime.engine, task.runtime.module = self.api, engine, module
        while not select.select([sys.stdin], [], [], 0.005)[0]:
            task.open()
            task.exports["start"](task.store, 1)
            task.close()
            yield

    def link(self, task):
        """A linker with the host functions for the instance of `task`."""
        counts = task.counts

        def add(left, right):
            counts.host_calls["host.add"] += 1
            if task.inner is not None:
                task.inner.call("start", task.options.calls)
            return (left + right) & 0x7FFFFFFF

        def write(pointer, length):
            counts.host_calls["host.write"] += 1
            line = task.memory.read(task.store, pointer, pointer + length)
            counts.syscall("host.write", "write")
            return os.write(task.output, line)

        def read_file(pointer, length):
            counts.host_calls["host.read_file"] += 1
            counts.syscall("host.read_file", "openat")
            file = os.open("/dev/zero", os.O_RDONLY)
            counts.syscall("host.read_file", "pread64")
            data = os.pread(file, length, 0)
            counts.syscall("host.read_file", "close")
            os.close(file)
            task.memory.write(task.store, data, pointer)
            return len(data)

        integer = self.api.ValType.i32()
        linker = self.api.Linker(self.engine)
        binary = self.api.FuncType([integer, integer], [integer])
        linker.define_func("host", "add", binary, add)
        linker.define_func("host", "write", binary, write)
        linker.define_func("host", "read_file", binary, read_file)
        return linker


class Task:
    """One store and instance, and all invocations in it."""

    def __init__(self, runtime, options, counts, inner=None):
        self.runtime = runtime
        self.options = options
        self.counts = counts
        self.inner = inner

    def open(self):
        """Makes the instance."""
        self.output = os.open(self.options.output, os.O_WRONLY | os.O_APPEND)
        self.store = self.runtime.api.Store(self.runtime.engine)
        instance = self.runtime.link(self).instantiate(self.store, self.runtime.module)
        self.exports = instance.exports(self.store)
        self.memory = self.exports["memory"]

    def close(self):
        """Closes its file."""
        os.close(self.output)

    def call(self, export, *arguments):
        """Calls an export and counts that."""
        self.counts.invocations[f"{self.runtime.name}/{export}"] += 1
        return self.exports[export](self.store, *arguments)

    def run(self):
        """Opens, calls and closes."""
        self.open()
        if self.inner is not None:
            self.inner.open()
        for _ in range(self.options.repeat):
            if self.options.quick:
                self.call("quick", 7)
            self.call("start", self.options.calls)
            if self.options.trap:
                self.trap()
        if self.inner is not None:
            self.inner.close()
        self.close()

    def trap(self):
        """Lets the guest fail."""
        try:
            self.call("fault")
        except self.runtime.api.Trap:
            self.counts.traps["memory_out_of_bounds"] += 1
        else:
            raise RuntimeError("the guest's fault did not trap")


def wait_for_line(option):
    """Waits for a line on standard input."""
    # Not through Python's buffer, which `select` does not know of.
    while True:
        byte = os.read(0, 1)
        if not byte:
            raise RuntimeError(f"stdin ended before the line that starts the run ({option})")
        if byte == b"\n":
            return


def prepare(options):
    """Loads and compiles, before or after the agent is told to come, and returns the runtimes."""
    names = ["pyguest"] + [f"pyguest{number}" for number in range(2, len(options.library) + 1)]
    runtimes = [Runtime(library, name) for library, name in zip(options.library or [None], names)]
    if not options.load_after_wait:
        for runtime in runtimes:
            runtime.load()
    if not options.compile_after_wait and not options.load_after_wait:
        for runtime in runtimes:
            runtime.compile()
    if options.wait:
        print("ready", flush=True)
        wait_for_line("--wait")
    if options.load_after_wait:
        for runtime in runtimes:
            runtime.load()
    if options.warm_up:
        rounds = [runtime.warm_up() for runtime in runtimes]
        while all([next(round, "done") != "done" for round in rounds]):
            pass
        wait_for_line("--warm-up")
    for runtime in runtimes:
        if runtime.module is None:
            runtime.compile()
    return runtimes


def run_workers(options, runtimes, total):
    """Lets forked processes do what each task does, adds what they count to `total`, and returns what lets them end."""
    held, let_go = os.pipe()
    reports = []
    for number in range(options.fork):
        report, writer = os.pipe()
        if os.fork() == 0:
            # Whatever happens, the child is not to go on as its parent would.
            try:
                os.close(let_go)
                counts = Counts()
                Task(runtimes[number % len(runtimes)], options, counts).run()
                os.write(writer, json.dumps(counts.report()).encode())
                os.close(writer)
                os.read(held, 1)
            finally:
                os._exit(0)
        os.close(writer)
        reports.append(report)
    os.close(held)
    for report in reports:
        with os.fdopen(report) as file:
            done = json.load(file)
        counts = Counts()
        counts.invocations.update(done["invocations"])
        counts.host_calls.update(done["host_calls"])
        counts.traps.update(done["traps"])
        counts.syscalls = {name: Counter(syscalls) for name, syscalls in done["syscalls_by_host_call"].items()}
        total.add(counts)
    return let_go


def map_decoys(count):
    """Maps so many files, executable and called as libraries of a runtime are; returns the mappings."""
    mappings = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(count):
            path = os.path.join(directory, f"libwasmtime-{number}.so")
            with open(path, "wb+") as file:
                file.write(b"\x7fELF" + bytes(4092))
                file.flush()
                mappings.append(mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
    return mappings


def run(options):
    """Runs all tasks, each on a thread of its own, and returns the report."""
    decoys = map_decoys(options.decoys)
    runtimes = prepare(options)
    per_task = [Counts() for _ in range(options.tasks)]
    failures = []
    tasks = []
    for number, counts in enumerate(per_task):
        runtime = runtimes[number % len(runtimes)]
        inner = None
        if options.nest:
            inner = Task(runtimes[(number + 1) % len(runtimes)], options, counts)
        tasks.append(Task(runtime, options, counts, inner))

    def guarded(task):
        try:
            task.run()
        except BaseException as error:  # noqa: BLE001 (handed to the main thread)
            failures.append(error)

    start = time.monotonic_ns()
    if options.tasks == 1:
        tasks[0].run()
    else:
        threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elapsed = time.monotonic_ns() - start
    if failures:
        raise failures[0]

    total = Counts()
    options.let_go = run_workers(options, runtimes, total) if options.fork else None
    for counts in per_task:
        total.add(counts)
    del decoys
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
    parser.add_argument("--library", action="append", default=[], metavar="DIRECTORY",
                        help="directory with a package wasmtime; several are used by tasks in turn (default: the installed one)")
    parser.add_argument("--load-after-wait", action="store_true", help="load and compile after that line")
    parser.add_argument("--warm-up", action="store_true",
                        help="before running, run an uncounted guest in each library until there is a line on stdin")
    parser.add_argument("--nest", action="store_true",
                        help="let each task's host.add call a guest in the next library")
    parser.add_argument("--decoys", type=at_least(0), default=0,
                        help="files that are mapped as libraries of a runtime would be, before anything is loaded")
    parser.add_argument("--fork", type=at_least(0), default=0,
                        help="after that, processes that do the same, and end when this one does")
    parser.add_argument("--quick", action="store_true", help="before each invocation, one that calls nothing")
    parser.add_argument("--hold", action="store_true", help="after printing, wait for a line or the end of stdin")
    parser.add_argument("--output", default="/dev/null", help="file that host.write writes to (default: /dev/null)")
    options = parser.parse_args()
    try:
        report = run(options)
    except Exception as error:  # noqa: BLE001 (wasmtime's own are of several copies)
        print(f"pywasm: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report), flush=True)
    if options.hold:
        os.read(0, 1)
    if options.let_go is not None:
        os.close(options.let_go)
        for _ in range(options.fork):
            os.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
