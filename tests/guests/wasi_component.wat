;; A command of WASI 0.2: twenty rounds of five host calls, the last of which drops a resource of the host's; and one that exits.
(component $command
  (import "wasi:io/poll@0.2.6" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.ready" (func (param "self" (borrow $pollable)) (result bool)))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.6" (instance $clock
    (alias outer 1 $pollable (type $outer_pollable))
    (export "pollable" (type $pollable (eq $outer_pollable)))
    (export "now" (func (result u64)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
  (import "wasi:random/random@0.2.6" (instance $random
    (export "get-random-u64" (func (result u64)))))
  (import "wasi:cli/exit@0.2.6" (instance $exit
    (export "exit" (func (param "status" (result))))))

  (core module $main_module (@name "main")
    (import "wasi:clocks/monotonic-clock@0.2.6" "now" (func $now (result i64)))
    (import "wasi:clocks/monotonic-clock@0.2.6" "subscribe-duration" (func $subscribe (param i64) (result i32)))
    (import "wasi:random/random@0.2.6" "get-random-u64" (func $random (result i64)))
    (import "wasi:io/poll@0.2.6" "[method]pollable.ready" (func $ready (param i32) (result i32)))
    (import "wasi:io/poll@0.2.6" "[resource-drop]pollable" (func $drop (param i32)))
    (import "wasi:cli/exit@0.2.6" "exit" (func $exit (param i32)))

    (func $quit (export "quit") (call $exit (i32.const 1)))
    (func $round
      (local $pollable i32)
      (drop (call $now))
      (drop (call $random))
      (local.set $pollable (call $subscribe (i64.const 0)))
      (drop (call $ready (local.get $pollable)))
      (call $drop (local.get $pollable)))

    (func $run (export "wasi:cli/run@0.2.6#run") (result i32)
      (local $left i32)
      (local.set $left (i32.const 20))
      (loop $next
        (call $round)
        (local.set $left (i32.sub (local.get $left) (i32.const 1)))
        (br_if $next (local.get $left)))
      (i32.const 0)))

  (core func $now (canon lower (func $clock "now")))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $random (canon lower (func $random "get-random-u64")))
  (core func $ready (canon lower (func $poll "[method]pollable.ready")))
  (core func $drop (canon resource.drop $pollable))
  (core func $exit (canon lower (func $exit "exit")))
  (core instance $main (instantiate $main_module
    (with "wasi:clocks/monotonic-clock@0.2.6" (instance
      (export "now" (func $now))
      (export "subscribe-duration" (func $subscribe))))
    (with "wasi:random/random@0.2.6" (instance (export "get-random-u64" (func $random))))
    (with "wasi:io/poll@0.2.6" (instance
      (export "[method]pollable.ready" (func $ready))
      (export "[resource-drop]pollable" (func $drop))))
    (with "wasi:cli/exit@0.2.6" (instance (export "exit" (func $exit))))))

  (func $run (result (result)) (canon lift (core func $main "wasi:cli/run@0.2.6#run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.6" (instance $command))
  (func (export "quit") (canon lift (core func $main "quit"))))
