;; Guest CPU time and nothing else: spin -> stretch -> step.
(module $spin
  (func $step (param $seed i32) (result i32)
    (local.set $seed (i32.xor (local.get $seed) (i32.shl (local.get $seed) (i32.const 13))))
    (local.set $seed (i32.xor (local.get $seed) (i32.shr_u (local.get $seed) (i32.const 17))))
    (i32.xor (local.get $seed) (i32.shl (local.get $seed) (i32.const 5))))

  (func $stretch (param $seed i32) (param $rounds i32) (result i32)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $rounds)))
        (local.set $seed (call $step (local.get $seed)))
        (local.set $rounds (i32.sub (local.get $rounds) (i32.const 1)))
        (br $next)))
    (local.get $seed))

  (func $spin (export "spin") (param $stretches i32) (param $rounds i32) (result i32)
    (local $seed i32)
    (local.set $seed (i32.const 2463534242))
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $stretches)))
        (local.set $seed (call $stretch (local.get $seed) (local.get $rounds)))
        (local.set $stretches (i32.sub (local.get $stretches) (i32.const 1)))
        (br $next)))
    (local.get $seed))
)
