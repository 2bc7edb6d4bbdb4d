;; Writes one line `count` times, `work` rounds of arithmetic before each: run -> write_line -> busy.
(module $writes
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "one line of text\n")

  (func $busy (param $work i32) (param $seed i32) (result i32)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $work)))
        ;; xorshift32: each round depends on the one before, so none can be skipped.
        (local.set $seed (i32.xor (local.get $seed) (i32.shl (local.get $seed) (i32.const 13))))
        (local.set $seed (i32.xor (local.get $seed) (i32.shr_u (local.get $seed) (i32.const 17))))
        (local.set $seed (i32.xor (local.get $seed) (i32.shl (local.get $seed) (i32.const 5))))
        (local.set $work (i32.sub (local.get $work) (i32.const 1)))
        (br $next)))
    (local.get $seed))

  (func $write_line (param $work i32) (param $seed i32) (result i32)
    (local.set $seed (call $busy (local.get $work) (local.get $seed)))
    (drop (call $host_write (i32.const 0) (i32.const 17)))
    (local.get $seed))

  (func $run (export "run") (param $count i32) (param $work i32) (result i32)
    (local $seed i32)
    (local.set $seed (i32.const 2463534242))
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $count)))
        (local.set $seed (call $write_line (local.get $work) (local.get $seed)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))
    (local.get $seed))
)
