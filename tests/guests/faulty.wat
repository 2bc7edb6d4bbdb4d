;; A guest with a fault for every occasion; the request's first letter says which.
(module $faulty
  (import "host" "log" (func $host_log (param i32 i32)))
  (import "host" "respond" (func $host_respond (param i32 i32 i32)))
  (import "host" "fail" (func $host_fail))
  (memory (export "memory") 1)
  (data (i32.const 0) "parsing rules")
  (data (i32.const 32) "nothing wrong\n")
  (global (export "request_buffer") i32 (i32.const 1024))
  (global (export "request_capacity") i32 (i32.const 2048))

  ;; A rule of 16-byte fields; follows its length field without checking it.
  (func $parse_rule (param $rule i32) (result i32)
    (local $length i32)
    (local.set $length (i32.load (local.get $rule)))
    (i32.load (i32.add (local.get $rule) (i32.mul (local.get $length) (i32.const 16)))))

  (func $reject_rule (unreachable))

  (func $average_cost (param $sum i32) (param $count i32) (result i32)
    (i32.div_u (local.get $sum) (local.get $count)))

  (func $expand_rule (param $depth i32) (result i32)
    (i32.add (local.get $depth) (call $expand_rule (i32.add (local.get $depth) (i32.const 1)))))

  (func $handle_request (export "handle_request") (param $request i32) (param $length i32) (result i32)
    (local $kind i32)
    (local.set $kind (i32.load8_u (local.get $request)))
    (call $host_log (i32.const 0) (i32.const 13))
    ;; memory_out_of_bounds
    (if (i32.eq (local.get $kind) (i32.const 109))
      (then
        (i32.store (i32.const 4096) (i32.const 0x07ff0000))
        (drop (call $parse_rule (i32.const 4096)))))
    ;; unreachable
    (if (i32.eq (local.get $kind) (i32.const 117)) (then (call $reject_rule)))
    ;; integer_division_by_zero
    (if (i32.eq (local.get $kind) (i32.const 105)) (then (drop (call $average_cost (local.get $length) (i32.const 0)))))
    ;; stack_overflow
    (if (i32.eq (local.get $kind) (i32.const 115)) (then (drop (call $expand_rule (i32.const 0)))))
    ;; host_error
    (if (i32.eq (local.get $kind) (i32.const 104)) (then (call $host_fail)))
    (call $host_respond (i32.const 200) (i32.const 32) (i32.const 14))
    (i32.const 200))
)
