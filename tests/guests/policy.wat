;; A policy filter: reads its rules through WASI, compares request headers with them, asks the upstream about
;; requests that pass.
(module $policy
  (import "host" "get_header" (func $host_get_header (param i32 i32 i32 i32) (result i32)))
  (import "host" "fetch" (func $host_fetch (param i32 i32) (result i32)))
  (import "host" "log" (func $host_log (param i32 i32)))
  (import "host" "respond" (func $host_respond (param i32 i32 i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $wasi_path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $wasi_fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $wasi_fd_close (param i32) (result i32)))
  (memory (export "memory") 1)

  ;; 0 texts, 512 descriptor and vectors, 1024 request, 4096 header value, 8192 rules.
  (data (i32.const 0) "policy.json")
  (data (i32.const 32) "request denied")
  (data (i32.const 64) "request passed")
  (data (i32.const 96) "cannot read the rules")
  (global (export "request_buffer") i32 (i32.const 1024))
  (global (export "request_capacity") i32 (i32.const 2048))

  ;; How often each WASI function was called, for the host to check against.
  (global $path_open_calls (export "calls:wasi_snapshot_preview1.path_open") (mut i32) (i32.const 0))
  (global $fd_read_calls (export "calls:wasi_snapshot_preview1.fd_read") (mut i32) (i32.const 0))
  (global $fd_close_calls (export "calls:wasi_snapshot_preview1.fd_close") (mut i32) (i32.const 0))

  ;; The string found last and the rule parsed last.
  (global $text (mut i32) (i32.const 0))
  (global $text_length (mut i32) (i32.const 0))
  (global $header (mut i32) (i32.const 0))
  (global $header_length (mut i32) (i32.const 0))
  (global $denied (mut i32) (i32.const 0))
  (global $denied_length (mut i32) (i32.const 0))

  (func $read_chunk (param $descriptor i32) (param $to i32) (param $capacity i32) (result i32)
    (i32.store (i32.const 516) (local.get $to))
    (i32.store (i32.const 520) (local.get $capacity))
    (global.set $fd_read_calls (i32.add (global.get $fd_read_calls) (i32.const 1)))
    (if (call $wasi_fd_read (local.get $descriptor) (i32.const 516) (i32.const 1) (i32.const 524))
      (then (return (i32.const 0))))
    (i32.load (i32.const 524)))

  ;; Reads policy.json to 8192; returns its length, or 0.
  (func $load_rules (result i32)
    (local $end i32)
    (local $count i32)
    (local $descriptor i32)
    (global.set $path_open_calls (i32.add (global.get $path_open_calls) (i32.const 1)))
    (if (call $wasi_path_open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 11) (i32.const 0)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 512))
      (then (return (i32.const 0))))
    (local.set $descriptor (i32.load (i32.const 512)))
    (local.set $end (i32.const 8192))
    (loop $more
      (local.set $count (call $read_chunk (local.get $descriptor) (local.get $end)
        (i32.sub (i32.const 32768) (local.get $end))))
      (local.set $end (i32.add (local.get $end) (local.get $count)))
      (br_if $more (local.get $count)))
    (global.set $fd_close_calls (i32.add (global.get $fd_close_calls) (i32.const 1)))
    (drop (call $wasi_fd_close (local.get $descriptor)))
    (i32.sub (local.get $end) (i32.const 8192)))

  ;; The next '"' at or after `position`, or `end`.
  (func $find_quote (param $position i32) (param $end i32) (result i32)
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $position) (local.get $end)))
        (br_if $done (i32.eq (i32.load8_u (local.get $position)) (i32.const 34)))
        (local.set $position (i32.add (local.get $position) (i32.const 1)))
        (br $next)))
    (local.get $position))

  ;; Sets $text to the next quoted string; returns the position after it, or one after `end` if there is none.
  (func $next_string (param $position i32) (param $end i32) (result i32)
    (local $closing i32)
    (global.set $text (i32.add (call $find_quote (local.get $position) (local.get $end)) (i32.const 1)))
    (local.set $closing (call $find_quote (global.get $text) (local.get $end)))
    (global.set $text_length (i32.sub (local.get $closing) (global.get $text)))
    (i32.add (local.get $closing) (i32.const 1)))

  ;; A rule is four strings: "header", its name, "deny", the text that it must not contain.
  (func $parse_rule (param $position i32) (param $end i32) (result i32)
    (local.set $position (call $next_string (local.get $position) (local.get $end)))
    (local.set $position (call $next_string (local.get $position) (local.get $end)))
    (global.set $header (global.get $text))
    (global.set $header_length (global.get $text_length))
    (local.set $position (call $next_string (local.get $position) (local.get $end)))
    (local.set $position (call $next_string (local.get $position) (local.get $end)))
    (global.set $denied (global.get $text))
    (global.set $denied_length (global.get $text_length))
    (local.get $position))

  (func $equal (param $left i32) (param $right i32) (param $length i32) (result i32)
    (block $differ
      (block $same
        (loop $next
          (br_if $same (i32.eqz (local.get $length)))
          (br_if $differ (i32.ne (i32.load8_u (local.get $left)) (i32.load8_u (local.get $right))))
          (local.set $left (i32.add (local.get $left) (i32.const 1)))
          (local.set $right (i32.add (local.get $right) (i32.const 1)))
          (local.set $length (i32.sub (local.get $length) (i32.const 1)))
          (br $next)))
      (return (i32.const 1)))
    (i32.const 0))

  (func $contains (param $text i32) (param $length i32) (param $part i32) (param $part_length i32) (result i32)
    (local $last i32)
    (if (i32.gt_u (local.get $part_length) (local.get $length)) (then (return (i32.const 0))))
    (local.set $last (i32.add (local.get $text) (i32.sub (local.get $length) (local.get $part_length))))
    (loop $next
      (if (call $equal (local.get $text) (local.get $part) (local.get $part_length)) (then (return (i32.const 1))))
      (local.set $text (i32.add (local.get $text) (i32.const 1)))
      (br_if $next (i32.le_u (local.get $text) (local.get $last))))
    (i32.const 0))

  (func $match_rule (result i32)
    (local $length i32)
    (local.set $length
      (call $host_get_header (global.get $header) (global.get $header_length) (i32.const 4096) (i32.const 1024)))
    (if (i32.lt_s (local.get $length) (i32.const 0)) (then (return (i32.const 0))))
    (call $contains (i32.const 4096) (local.get $length) (global.get $denied) (global.get $denied_length)))

  ;; 1 if some rule denies the request.
  (func $evaluate_rules (param $length i32) (result i32)
    (local $position i32)
    (local $end i32)
    (local.set $end (i32.add (i32.const 8192) (local.get $length)))
    (local.set $position (call $next_string (i32.const 8192) (local.get $end)))
    (block $done
      (loop $next
        (local.set $position (call $parse_rule (local.get $position) (local.get $end)))
        (br_if $done (i32.gt_u (local.get $position) (local.get $end)))
        (if (call $match_rule) (then (return (i32.const 1))))
        (br $next)))
    (i32.const 0))

  (func $ask_upstream (param $request i32) (param $length i32) (result i32)
    (call $host_fetch (local.get $request) (local.get $length)))

  (func $finish (param $status i32) (param $message i32) (param $length i32) (result i32)
    (call $host_log (local.get $message) (local.get $length))
    (call $host_respond (local.get $status) (local.get $message) (local.get $length))
    (local.get $status))

  (func $handle_request (export "handle_request") (param $request i32) (param $length i32) (result i32)
    (local $rules_length i32)
    (local.set $rules_length (call $load_rules))
    (if (i32.eqz (local.get $rules_length))
      (then (return (call $finish (i32.const 500) (i32.const 96) (i32.const 21)))))
    (if (call $evaluate_rules (local.get $rules_length))
      (then (return (call $finish (i32.const 403) (i32.const 32) (i32.const 14)))))
    (call $finish (call $ask_upstream (local.get $request) (local.get $length)) (i32.const 64) (i32.const 14)))
)
