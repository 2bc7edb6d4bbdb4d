;; As `leave` of crossings.wat, in a component.
(component
  (import "test:host/ops@1.0.0" (instance $ops
    (export "add" (func (param "left" u32) (param "right" u32) (result u32)))))

  (core module $crossings_module (@name "crossings")
    (import "host" "add" (func $host_add (param i32 i32) (result i32)))
    (func (export "leave") (param $count i32) (result i32)
      (local $sum i32)
      (block $done
        (loop $next
          (br_if $done (i32.eqz (local.get $count)))
          (local.set $sum (call $host_add (local.get $sum) (i32.const 1)))
          (local.set $count (i32.sub (local.get $count) (i32.const 1)))
          (br $next)))
      (local.get $sum)))

  (core func $add (canon lower (func $ops "add")))
  (core instance $crossings (instantiate $crossings_module
    (with "host" (instance (export "add" (func $add))))))
  (func (export "leave") (param "count" u32) (result u32) (canon lift (core func $crossings "leave"))))
