;; A component that calls each of five host functions of three interfaces `count` times, each from three frames deep
;; (start -> loop_emit -> emit), and exports functions with and without an interface.
(component $guest
  (import "wasi:clocks/monotonic-clock@0.2.6" (instance $clock
    (export "now" (func (result u64)))))
  (import "test:host/ops@1.0.0" (instance $ops
    (export "add" (func (param "left" u32) (param "right" u32) (result u32)))
    (export "nap" (func))
    (export "fail" (func))))
  (import "test:host/store@1.0.0" (instance $store
    (export "write" (func (param "bytes" (list u8)) (result u32)))
    (export "read" (func (param "length" u32) (result (list u8))))))

  ;; The memory, and the allocator through which the host hands over what does not fit into a result.
  (core module $libc_module (@name "libc")
    (memory (export "memory") 1)
    (data (i32.const 0) "one line of text\n")
    (func $cabi_realloc (export "cabi_realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32)
      (result i32)
      (i32.const 4096)))

  (core module $main_module (@name "main")
    (import "libc" "memory" (memory 1))
    (import "host" "now" (func $host_now (result i64)))
    (import "host" "add" (func $host_add (param i32 i32) (result i32)))
    (import "host" "nap" (func $host_nap))
    (import "host" "fail" (func $host_fail))
    (import "host" "write" (func $host_write (param i32 i32) (result i32)))
    (import "host" "read" (func $host_read (param i32 i32)))

    (func $emit (param $round i32) (result i32)
      (local $sum i32)
      (local.set $sum (i32.wrap_i64 (call $host_now)))
      (local.set $sum (call $host_add (local.get $sum) (local.get $round)))
      (local.set $sum (i32.add (local.get $sum) (call $host_write (i32.const 0) (i32.const 17))))
      (call $host_nap)
      (call $host_read (i32.const 256) (i32.const 1024))
      (i32.add (local.get $sum) (i32.load (i32.const 1028))))

    (func $loop_emit (param $count i32) (result i32)
      (local $round i32)
      (local $sum i32)
      (block $done
        (loop $next
          (br_if $done (i32.ge_u (local.get $round) (local.get $count)))
          (local.set $sum (i32.add (local.get $sum) (call $emit (local.get $round))))
          (local.set $round (i32.add (local.get $round) (i32.const 1)))
          (br $next)))
      (local.get $sum))

    (func $start (export "run_start") (param $count i32) (result i32)
      (i32.add (call $loop_emit (local.get $count)) (i32.const 0)))

    ;; Gives back the text it was given: pointer and length, at 2048.
    (func $greet (export "greet") (param $pointer i32) (param $length i32) (result i32)
      (i32.store (i32.const 2048) (local.get $pointer))
      (i32.store (i32.const 2052) (local.get $length))
      (i32.const 2048))
    ;; Asks the host to fail, or fails by itself.
    (func $stumble (export "stumble") (param $alone i32)
      (if (local.get $alone) (then (unreachable)))
      (call $host_fail))
    (func $cabi_post_greet (export "cabi_post_greet") (param $result i32)))

  (core instance $libc (instantiate $libc_module))
  (core func $now (canon lower (func $clock "now")))
  (core func $add (canon lower (func $ops "add")))
  (core func $nap (canon lower (func $ops "nap")))
  (core func $fail (canon lower (func $ops "fail")))
  (core func $write (canon lower (func $store "write") (memory (core memory $libc "memory"))))
  (core func $read (canon lower (func $store "read")
    (memory (core memory $libc "memory")) (realloc (core func $libc "cabi_realloc"))))
  (core instance $main (instantiate $main_module
    (with "libc" (instance $libc))
    (with "host" (instance
      (export "now" (func $now))
      (export "add" (func $add))
      (export "nap" (func $nap))
      (export "fail" (func $fail))
      (export "write" (func $write))
      (export "read" (func $read))))))

  (func $start (param "count" u32) (result u32) (canon lift (core func $main "run_start")))
  (instance $runner (export "start" (func $start)))
  (export "test:guest/runner@1.0.0" (instance $runner))
  (func (export "stumble") (param "alone" bool) (canon lift (core func $main "stumble")))
  (func (export "greet") (param "name" string) (result string)
    (canon lift (core func $main "greet")
      (memory (core memory $libc "memory"))
      (realloc (core func $libc "cabi_realloc"))
      (post-return (core func $main "cabi_post_greet")))))
