;; One crossing of the boundary and nothing else: enter does nothing, leave calls the host `count` times.
(module $crossings
  (import "host" "add" (func $host_add (param i32 i32) (result i32)))

  (func (export "enter"))

  (func (export "leave") (param $count i32) (result i32)
    (local $sum i32)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $count)))
        (local.set $sum (call $host_add (local.get $sum) (i32.const 1)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))
    (local.get $sum))
)
