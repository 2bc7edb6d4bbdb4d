;; A WASI command that counts its own host calls and prints how many there were: _start -> round -> write_line.
(module $hello
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock_time_get (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "one line\n")
  (data (i32.const 96) "notes.txt")
  (data (i32.const 128) "clock_time_get ")
  (data (i32.const 160) "fd_close ")
  (data (i32.const 192) "fd_write ")
  (data (i32.const 224) "path_open ")
  ;; Calls of each so far.
  (global $clocks (mut i32) (i32.const 0))
  (global $closes (mut i32) (i32.const 0))
  (global $writes (mut i32) (i32.const 0))
  (global $opens (mut i32) (i32.const 0))

  ;; WASI's errors are numbers other than 0.
  (func $check (param $error i32) (if (local.get $error) (then (unreachable))))

  (func $write_line (param $descriptor i32) (param $text i32) (param $length i32)
    (global.set $writes (i32.add (global.get $writes) (i32.const 1)))
    (i32.store (i32.const 0) (local.get $text))
    (i32.store (i32.const 4) (local.get $length))
    (call $check (call $fd_write (local.get $descriptor) (i32.const 0) (i32.const 1) (i32.const 8))))

  (func $open (result i32)
    (global.set $opens (i32.add (global.get $opens) (i32.const 1)))
    ;; Creates it in the first preopened folder, to be written to.
    (call $check (call $path_open (i32.const 3) (i32.const 0) (i32.const 96) (i32.const 9)
      (i32.const 1) (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 16)))
    (i32.load (i32.const 16)))

  (func $round (param $file i32)
    (global.set $clocks (i32.add (global.get $clocks) (i32.const 1)))
    (call $check (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 24)))
    (call $write_line (i32.const 1) (i32.const 64) (i32.const 9))
    (call $write_line (local.get $file) (i32.const 64) (i32.const 9)))

  ;; Writes decimal digits, and says where they end.
  (func $digits (param $value i32) (param $at i32) (result i32)
    (if (i32.ge_u (local.get $value) (i32.const 10))
      (then (local.set $at (call $digits (i32.div_u (local.get $value) (i32.const 10)) (local.get $at)))))
    (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.rem_u (local.get $value) (i32.const 10))))
    (i32.add (local.get $at) (i32.const 1)))

  (func $report (param $name i32) (param $length i32) (param $count i32)
    (local $end i32)
    (memory.copy (i32.const 512) (local.get $name) (local.get $length))
    (local.set $end (call $digits (local.get $count) (i32.add (i32.const 512) (local.get $length))))
    (i32.store8 (local.get $end) (i32.const 10))
    (call $write_line (i32.const 1) (i32.const 512) (i32.sub (local.get $end) (i32.const 511))))

  (func $start (export "_start")
    (local $file i32)
    (local $left i32)
    (local.set $file (call $open))
    (local.set $left (i32.const 25))
    (loop $next
      (call $round (local.get $file))
      (local.set $left (i32.sub (local.get $left) (i32.const 1)))
      (br_if $next (local.get $left)))
    (global.set $closes (i32.add (global.get $closes) (i32.const 1)))
    (call $check (call $fd_close (local.get $file)))
    (call $report (i32.const 128) (i32.const 15) (global.get $clocks))
    (call $report (i32.const 160) (i32.const 9) (global.get $closes))
    (call $report (i32.const 224) (i32.const 10) (global.get $opens))
    ;; With the one that says so.
    (call $report (i32.const 192) (i32.const 9) (i32.add (global.get $writes) (i32.const 1))))
)
