;; A guest that works until it is stopped.
(module $interrupted
  (import "host" "tick" (func $tick))
  (func $work (param $rounds i32) (result i32)
    (local $sum i32)
    (loop $again
      (local.set $sum (i32.add (i32.mul (local.get $sum) (i32.const 31)) (local.get $rounds)))
      (br_if $again (local.tee $rounds (i32.sub (local.get $rounds) (i32.const 1)))))
    (local.get $sum))
  (func (export "work") (param i32) (drop (call $work (local.get 0))))

  ;; Time passes with each round.
  (func $watch (param $rounds i32)
    (loop $again
      (call $tick)
      (br_if $again (local.tee $rounds (i32.sub (local.get $rounds) (i32.const 1))))))
  (func (export "watch") (param i32) (call $watch (local.get 0)))
)
