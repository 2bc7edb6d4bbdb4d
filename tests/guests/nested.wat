;; Host functions that call back: level1 -> host.descend -> level2 (this instance) -> host.cross -> inner's level3.
(module $nested
  (import "host" "descend" (func $host_descend))
  (import "host" "cross" (func $host_cross))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "level\n")

  (func $note (drop (call $host_write (i32.const 0) (i32.const 6))))

  (func $level1 (export "level1") (param $count i32)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $count)))
        (call $note)
        (call $host_descend)
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next))))

  (func $level2 (export "level2")
    (call $note)
    (call $host_cross))
)
