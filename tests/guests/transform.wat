;; Text and image transforms over a file read through WASI in small pieces, about a millisecond of work each.
(module $transform
  (import "host" "respond" (func $host_respond (param i32 i32 i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $wasi_path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $wasi_fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $wasi_fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $wasi_clock_time_get (param i32 i64 i32) (result i32)))
  (memory (export "memory") 4)

  ;; 0 texts, 512 descriptor and vectors, 1024 request, 65536 input, 131072 output, 196608 blurred output.
  (data (i32.const 0) "article.txt")
  (data (i32.const 32) "photo.ppm")
  (data (i32.const 64) "no such operation\n")
  (data (i32.const 96) "cannot read the input\n")
  (global (export "request_buffer") i32 (i32.const 1024))
  (global (export "request_capacity") i32 (i32.const 2048))

  ;; How often each WASI function was called, for the host to check against.
  (global $path_open_calls (export "calls:wasi_snapshot_preview1.path_open") (mut i32) (i32.const 0))
  (global $fd_read_calls (export "calls:wasi_snapshot_preview1.fd_read") (mut i32) (i32.const 0))
  (global $fd_close_calls (export "calls:wasi_snapshot_preview1.fd_close") (mut i32) (i32.const 0))
  (global $clock_time_get_calls (export "calls:wasi_snapshot_preview1.clock_time_get") (mut i32) (i32.const 0))

  (func $now (result i64)
    (global.set $clock_time_get_calls (i32.add (global.get $clock_time_get_calls) (i32.const 1)))
    (drop (call $wasi_clock_time_get (i32.const 1) (i64.const 1) (i32.const 536)))
    (i64.load (i32.const 536)))

  (func $read_chunk (param $descriptor i32) (param $to i32) (result i32)
    (i32.store (i32.const 516) (local.get $to))
    (i32.store (i32.const 520) (i32.const 512))
    (global.set $fd_read_calls (i32.add (global.get $fd_read_calls) (i32.const 1)))
    (if (call $wasi_fd_read (local.get $descriptor) (i32.const 516) (i32.const 1) (i32.const 524))
      (then (return (i32.const 0))))
    (i32.load (i32.const 524)))

  ;; Reads the file to 65536; returns its length, or 0. Looks at the clock before every piece, as things that report
  ;; progress do.
  (func $read_input (param $path i32) (param $path_length i32) (result i32)
    (local $end i32)
    (local $count i32)
    (local $descriptor i32)
    (global.set $path_open_calls (i32.add (global.get $path_open_calls) (i32.const 1)))
    (if (call $wasi_path_open (i32.const 3) (i32.const 0) (local.get $path) (local.get $path_length) (i32.const 0)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 512))
      (then (return (i32.const 0))))
    (local.set $descriptor (i32.load (i32.const 512)))
    (local.set $end (i32.const 65536))
    (loop $more
      (drop (call $now))
      (local.set $count (call $read_chunk (local.get $descriptor) (local.get $end)))
      (local.set $end (i32.add (local.get $end) (local.get $count)))
      (br_if $more (i32.and (i32.ne (local.get $count) (i32.const 0))
        (i32.le_u (local.get $end) (i32.const 130560)))))
    (global.set $fd_close_calls (i32.add (global.get $fd_close_calls) (i32.const 1)))
    (drop (call $wasi_fd_close (local.get $descriptor)))
    (i32.sub (local.get $end) (i32.const 65536)))

  (func $is_letter (param $byte i32) (result i32)
    (i32.lt_u (i32.sub (i32.or (local.get $byte) (i32.const 32)) (i32.const 97)) (i32.const 26)))

  (func $to_upper (param $byte i32) (result i32)
    (if (call $is_letter (local.get $byte)) (then (return (i32.and (local.get $byte) (i32.const 0xdf)))))
    (local.get $byte))

  (func $to_rot13 (param $byte i32) (result i32)
    (local $case i32)
    (if (i32.eqz (call $is_letter (local.get $byte))) (then (return (local.get $byte))))
    (local.set $case (i32.and (local.get $byte) (i32.const 0x20)))
    (i32.or (local.get $case)
      (i32.add (i32.const 65)
        (i32.rem_u (i32.sub (i32.and (local.get $byte) (i32.const 0xdf)) (i32.const 52)) (i32.const 26)))))

  ;; Writes the transformed text to 131072; `operation` is the request's first letter.
  (func $transform_text (param $length i32) (param $operation i32)
    (local $offset i32)
    (local $byte i32)
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $offset) (local.get $length)))
        (local.set $byte (i32.load8_u offset=65536 (local.get $offset)))
        (if (i32.eq (local.get $operation) (i32.const 117))
          (then (local.set $byte (call $to_upper (local.get $byte))))
          (else (local.set $byte (call $to_rot13 (local.get $byte)))))
        (i32.store8 offset=131072 (local.get $offset) (local.get $byte))
        (local.set $offset (i32.add (local.get $offset) (i32.const 1)))
        (br $next))))

  ;; FNV-1a over what is at `from`, once for each of `rounds`.
  (func $checksum (param $from i32) (param $length i32) (param $rounds i32) (result i32)
    (local $sum i32)
    (local $offset i32)
    (local.set $sum (i32.const 0x811c9dc5))
    (loop $round
      (local.set $offset (i32.const 0))
      (block $done
        (loop $next
          (br_if $done (i32.ge_u (local.get $offset) (local.get $length)))
          (local.set $sum
            (i32.mul
              (i32.xor (local.get $sum) (i32.load8_u (i32.add (local.get $from) (local.get $offset))))
              (i32.const 0x01000193)))
          (local.set $offset (i32.add (local.get $offset) (i32.const 1)))
          (br $next)))
      (local.set $rounds (i32.sub (local.get $rounds) (i32.const 1)))
      (br_if $round (i32.gt_s (local.get $rounds) (i32.const 0))))
    (local.get $sum))

  (func $count_words (param $length i32) (result i32)
    (local $offset i32)
    (local $words i32)
    (local $inside i32)
    (local $letter i32)
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $offset) (local.get $length)))
        (local.set $letter (call $is_letter (i32.load8_u offset=65536 (local.get $offset))))
        (local.set $words (i32.add (local.get $words)
          (i32.and (local.get $letter) (i32.eqz (local.get $inside)))))
        (local.set $inside (local.get $letter))
        (local.set $offset (i32.add (local.get $offset) (i32.const 1)))
        (br $next)))
    (local.get $words))

  ;; Decimal digits of `number` at 131072; returns how many.
  (func $print_number (param $number i32) (result i32)
    (local $digits i32)
    (local $rest i32)
    (local.set $rest (local.get $number))
    (loop $count
      (local.set $digits (i32.add (local.get $digits) (i32.const 1)))
      (local.set $rest (i32.div_u (local.get $rest) (i32.const 10)))
      (br_if $count (local.get $rest)))
    (local.set $rest (local.get $digits))
    (loop $write
      (local.set $rest (i32.sub (local.get $rest) (i32.const 1)))
      (i32.store8 offset=131072 (local.get $rest)
        (i32.add (i32.const 48) (i32.rem_u (local.get $number) (i32.const 10))))
      (local.set $number (i32.div_u (local.get $number) (i32.const 10)))
      (br_if $write (local.get $rest)))
    (local.get $digits))

  ;; A binary PPM of 96 by 64 with a header of 13 bytes becomes 6144 grey bytes at 131072.
  (func $to_gray
    (local $pixel i32)
    (local $from i32)
    (loop $next
      (local.set $from (i32.mul (local.get $pixel) (i32.const 3)))
      (i32.store8 offset=131072 (local.get $pixel)
        (i32.shr_u
          (i32.add
            (i32.add
              (i32.mul (i32.load8_u offset=65549 (local.get $from)) (i32.const 77))
              (i32.mul (i32.load8_u offset=65550 (local.get $from)) (i32.const 150)))
            (i32.mul (i32.load8_u offset=65551 (local.get $from)) (i32.const 29)))
          (i32.const 8)))
      (local.set $pixel (i32.add (local.get $pixel) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $pixel) (i32.const 6144)))))

  ;; Each inner pixel becomes the mean of itself and its four neighbours.
  (func $blur_once
    (local $pixel i32)
    (local.set $pixel (i32.const 97))
    (loop $next
      (i32.store8 offset=196608 (local.get $pixel)
        (i32.div_u
          (i32.add
            (i32.add
              (i32.add (i32.load8_u offset=130976 (local.get $pixel)) (i32.load8_u offset=131168 (local.get $pixel)))
              (i32.add (i32.load8_u offset=131071 (local.get $pixel)) (i32.load8_u offset=131073 (local.get $pixel))))
            (i32.load8_u offset=131072 (local.get $pixel)))
          (i32.const 5)))
      (local.set $pixel (i32.add (local.get $pixel) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $pixel) (i32.const 6047))))
    (memory.copy (i32.const 131169) (i32.const 196705) (i32.const 5950)))

  (func $blur (param $passes i32)
    (loop $next
      (call $blur_once)
      (local.set $passes (i32.sub (local.get $passes) (i32.const 1)))
      (br_if $next (local.get $passes))))

  (func $respond (param $status i32) (param $body i32) (param $length i32) (result i32)
    (call $host_respond (local.get $status) (local.get $body) (local.get $length))
    (local.get $status))

  (func $handle_image (result i32)
    (if (i32.eqz (call $read_input (i32.const 32) (i32.const 9)))
      (then (return (call $respond (i32.const 500) (i32.const 96) (i32.const 22)))))
    (call $to_gray)
    (call $blur (i32.const 80))
    (call $respond (i32.const 200) (i32.const 131072) (i32.const 6144)))

  (func $handle_text (param $operation i32) (result i32)
    (local $length i32)
    (local.set $length (call $read_input (i32.const 0) (i32.const 11)))
    (if (i32.eqz (local.get $length))
      (then (return (call $respond (i32.const 500) (i32.const 96) (i32.const 22)))))
    (if (i32.eq (local.get $operation) (i32.const 119))
      (then
        (drop (call $checksum (i32.const 65536) (local.get $length) (i32.const 100)))
        (local.set $length (call $print_number (call $count_words (local.get $length)))))
      (else
        (call $transform_text (local.get $length) (local.get $operation))
        (drop (call $checksum (i32.const 131072) (local.get $length) (i32.const 100)))))
    (call $respond (i32.const 200) (i32.const 131072) (local.get $length)))

  ;; The request is `upper`, `rot13`, `words` or `gray`.
  (func $handle_request (export "handle_request") (param $request i32) (param $length i32) (result i32)
    (local $operation i32)
    (local.set $operation (i32.load8_u (local.get $request)))
    (if (i32.eq (local.get $operation) (i32.const 103)) (then (return (call $handle_image))))
    (if (i32.or
          (i32.or (i32.eq (local.get $operation) (i32.const 117)) (i32.eq (local.get $operation) (i32.const 114)))
          (i32.eq (local.get $operation) (i32.const 119)))
      (then (return (call $handle_text (local.get $operation)))))
    (call $respond (i32.const 400) (i32.const 64) (i32.const 18)))
)
