;; Results and failures that can be compared between two runs: mix -> round, fail -> descend -> … -> give_up.
(module $steady
  (import "host" "add" (func $host_add (param i32 i32) (result i32)))
  (import "host" "nap" (func $host_nap))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (import "host" "read_file" (func $host_read_file (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "one line of text\n")

  (func $round (param $state i32) (result i32)
    (local.set $state (call $host_add (local.get $state) (call $host_write (i32.const 0) (i32.const 17))))
    (call $host_nap)
    (local.set $state (call $host_add (local.get $state) (call $host_read_file (i32.const 1024) (i32.const 256))))
    ;; What the host put into memory is part of the result.
    (i32.xor (i32.mul (local.get $state) (i32.const 16777619)) (i32.load8_u (i32.const 1024))))

  (func $mix (export "mix") (param $count i32) (result i32)
    (local $state i32)
    (local.set $state (i32.const 0x811c9dc5))
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $count)))
        (local.set $state (call $round (local.get $state)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))
    (local.get $state))

  (func $give_up (unreachable))
  (func $descend (param $depth i32)
    (if (i32.eqz (local.get $depth)) (then (call $host_nap) (call $give_up)))
    (call $descend (i32.sub (local.get $depth) (i32.const 1))))
  (func $fail (export "fail") (param $depth i32) (call $descend (local.get $depth)))
)
