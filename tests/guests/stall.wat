;; One host call that takes as long as it takes.
(module $stall
  (import "host" "stall" (func $stall))
  (func $wait (call $stall))
  (func (export "run") (call $wait)))
