;; Calls each of four host functions `count` times, each from three frames deep: start -> loop_emit -> emit.
(module $calls
  (import "host" "add" (func $host_add (param i32 i32) (result i32)))
  (import "host" "nap" (func $host_nap))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (import "host" "read_file" (func $host_read_file (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "one line of text\n")

  (func $emit (param $round i32) (result i32)
    (local $sum i32)
    (local.set $sum (call $host_add (local.get $round) (i32.const 1)))
    (local.set $sum (i32.add (local.get $sum) (call $host_write (i32.const 0) (i32.const 17))))
    (call $host_nap)
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
)
