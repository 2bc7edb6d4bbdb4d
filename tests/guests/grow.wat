;; A guest that grows what it is told to, by as much as it is told.
(module $grow
  (memory (export "memory") 1 80)
  (table $handlers (export "handlers") 10 90 funcref)
  (memory $other (export "other") 2)
  (func $more (param i32) (result i32) (memory.grow 0 (local.get 0)))
  (func (export "memory_grow") (param i32) (result i32) (call $more (local.get 0)))
  (func (export "other_grow") (param i32) (result i32) (memory.grow $other (local.get 0)))
  (func (export "table_grow") (param i32) (result i32)
    (table.grow $handlers (ref.null func) (local.get 0)))
  ;; Page by page.
  (func (export "grow_by_page") (param $pages i32) (result i32)
    (loop $again
      (drop (call $more (i32.const 1)))
      (br_if $again (local.tee $pages (i32.sub (local.get $pages) (i32.const 1)))))
    (memory.size 0))
)
