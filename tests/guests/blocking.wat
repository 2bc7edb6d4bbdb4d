;; Host calls that wait for helper threads. Each round: WASI opens, reads and closes a file; then the host's own functions, of which
;; `detached` leaves work behind that is only done while `settle` is waited for.
(module $blocking
  (type $path_open (func (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (type $path_open)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "host" "read_elsewhere" (func $read_elsewhere (result i32)))
  (import "host" "read_twice" (func $read_twice (result i32)))
  (import "host" "in_place" (func $in_place (result i32)))
  (import "host" "detached" (func $detached))
  (import "host" "settle" (func $settle))
  (memory (export "memory") 1)
  (data (i32.const 0) "input")
  ;; An iovec: 64 bytes at 1024.
  (data (i32.const 16) "\00\04\00\00\40\00\00\00")

  (func $read_file
    ;; Directory 3 is the first preopened one; no following of links, no create, the right to read.
    (if (call $path_open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 5) (i32.const 0)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 32))
      (then unreachable))
    (if (call $fd_read (i32.load (i32.const 32)) (i32.const 16) (i32.const 1) (i32.const 36)) (then unreachable))
    (if (i32.ne (i32.load (i32.const 36)) (i32.const 64)) (then unreachable))
    (if (call $fd_close (i32.load (i32.const 32))) (then unreachable)))

  (func (export "read") (param $rounds i32)
    (loop $again
      (call $read_file)
      (if (i32.ne (call $read_elsewhere) (i32.const 64)) (then unreachable))
      (if (i32.ne (call $read_twice) (i32.const 128)) (then unreachable))
      (local.set $rounds (i32.sub (local.get $rounds) (i32.const 1)))
      (br_if $again (local.get $rounds))))

  (func (export "in_place") (param $rounds i32)
    (loop $again
      (if (i32.ne (call $in_place) (i32.const 64)) (then unreachable))
      (local.set $rounds (i32.sub (local.get $rounds) (i32.const 1)))
      (br_if $again (local.get $rounds))))

  (func (export "detached") (param $rounds i32)
    (loop $again
      (call $detached)
      (call $settle)
      (local.set $rounds (i32.sub (local.get $rounds) (i32.const 1)))
      (br_if $again (local.get $rounds)))))
