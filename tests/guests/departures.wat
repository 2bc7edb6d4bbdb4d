;; Host calls during which the process ends or becomes another; nothing after them runs.
(module $departures
  (import "host" "exec" (func $host_exec))
  (import "host" "exit" (func $host_exit))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "going\n")

  (func $farewell (drop (call $host_write (i32.const 0) (i32.const 6))))

  (func $leave_by_exec (export "leave_by_exec")
    (call $farewell)
    (call $host_exec)
    (unreachable))

  (func $leave_by_exit (export "leave_by_exit")
    (call $farewell)
    (call $host_exit)
    (unreachable))
)
