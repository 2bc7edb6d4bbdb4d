;; The innermost level of `nested`, in a module of its own.
(module $inner
  (import "host" "nap" (func $host_nap))
  (import "host" "write" (func $host_write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "innermost\n")

  (func $settle (call $host_nap))

  (func $level3 (export "level3")
    (drop (call $host_write (i32.const 0) (i32.const 10)))
    (call $settle))
)
