;; One export for each way in which an invocation can end.
(module $traps
  (import "host" "fail" (func $host_fail))
  (import "host" "attempt" (func $host_attempt (result i32)))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (table $handlers 4 funcref)
  (elem (table $handlers) (i32.const 0) func $deep)
  (type $other (func (param f64) (result f64)))
  (tag $refused)
  (data (i32.const 0) "fine\n")

  (func $report (drop (call $host_write (i32.const 0) (i32.const 5))))

  (func $ok (export "ok") (call $report))

  (func $parse_rule (param $pointer i32) (result i32) (i32.load (local.get $pointer)))
  (func $memory_out_of_bounds (export "memory_out_of_bounds")
    (call $report)
    (drop (call $parse_rule (i32.const 0x7fff0000))))

  (func $reject (unreachable))
  (func $unreachable (export "unreachable")
    (call $report)
    (call $reject))

  (func $average (param $sum i32) (param $count i32) (result i32)
    (i32.div_u (local.get $sum) (local.get $count)))
  (func $integer_division_by_zero (export "integer_division_by_zero")
    (call $report)
    (drop (call $average (i32.const 7) (i32.const 0))))

  (func $integer_overflow (export "integer_overflow")
    (drop (i32.div_s (i32.const 0x80000000) (i32.const -1))))

  (func $deep (param $depth i32) (result i32)
    (i32.add (local.get $depth) (call $deep (i32.add (local.get $depth) (i32.const 1)))))
  (func $stack_overflow (export "stack_overflow")
    (call $report)
    (drop (call $deep (i32.const 0))))

  (func $indirect_call_to_null (export "indirect_call_to_null")
    (drop (call_indirect $handlers (param i32) (result i32) (i32.const 0) (i32.const 2))))
  (func $bad_signature (export "bad_signature")
    (drop (call_indirect $handlers (type $other) (f64.const 0) (i32.const 0))))
  (func $table_out_of_bounds (export "table_out_of_bounds")
    (drop (call_indirect $handlers (param i32) (result i32) (i32.const 0) (i32.const 9))))

  (func $host_error (export "host_error")
    (call $report)
    (call $host_fail))

  ;; An exception that the guest catches, and one that it does not.
  (func $refuse (call $report) (throw $refused))
  (func $caught (export "caught")
    (block $handler
      (try_table (catch $refused $handler) (call $refuse))
      (unreachable)))
  (func $uncaught_exception (export "uncaught_exception") (call $refuse))

  ;; The host calls `unreachable` above, swallows its trap and lets this go on.
  (func $survive (export "survive")
    (if (i32.eqz (call $host_attempt)) (then (unreachable)))
    (call $report))
)
