//! A store with its instances, and calls into them that are counted.

use std::pin::pin;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use wasmtime::{AsContextMut, Engine, Instance, InstancePre, Store, Trap, TypedFunc, WasmParams, WasmResults};
use wasmtime_wasi::I32Exit;
use wasmtime_wasi::p1::WasiP1Ctx;

use crate::counts::{Counter, Counts};
use crate::limiter::{Limiter, SlowLimiter};
use crate::nap::Bed;
use crate::options::Mode;

/// What host functions find in their store.
pub struct State {
    /// Where the task that owns the store naps.
    pub bed: Bed,
    /// The store's instances, in the order of the scenario's modules.
    pub instances: Vec<Instance>,
    /// For scenarios that use WASI.
    pub wasi: Option<WasiP1Ctx>,
    /// What keeps the store's memories and tables from growing, in scenarios that use it.
    pub limiter: Limiter,
    /// The same, with time to think.
    pub slow_limiter: SlowLimiter,
}

/// Calls that are counted, in either mode.
#[derive(Clone, Debug)]
pub struct Invoker {
    /// Where to count.
    pub counts: Arc<Counts>,
}

impl Invoker {
    /// Calls `function`, counting it in `invocations` and, if it fails, among the traps.
    pub fn call<P: WasmParams, R: WasmResults>(
        &self,
        store: impl AsContextMut<Data: Send>,
        invocations: &Counter,
        function: &TypedFunc<P, R>,
        params: P,
    ) -> wasmtime::Result<R> {
        invocations.add_one();
        self.note_error(function.call(store, params))
    }

    /// As [`Self::call`], on a fiber; counts its suspends and resumes too.
    pub async fn call_async<P: WasmParams + Sync, R: WasmResults + Sync>(
        &self,
        store: impl AsContextMut<Data: Send>,
        invocations: &Counter,
        function: &TypedFunc<P, R>,
        params: P,
    ) -> wasmtime::Result<R> {
        invocations.add_one();
        let result = self.watch(function.call_async(store, params)).await;
        self.note_error(result)
    }

    /// Awaits `invocation`, which is one `call_async`. Each of its polls but the first resumes its fiber, each that is
    /// pending suspends it.
    pub(crate) async fn watch<F: Future>(&self, invocation: F) -> F::Output {
        let mut invocation = pin!(invocation);
        let mut left = None;
        std::future::poll_fn(|context| {
            let thread = std::thread::current().id();
            if let Some(left) = left {
                self.counts.resumes.add_one();
                if left != thread {
                    self.counts.moves.add_one();
                }
            }
            left = Some(thread);
            let poll = invocation.as_mut().poll(context);
            if poll.is_pending() {
                self.counts.suspends.add_one();
            }
            poll
        })
        .await
    }

    /// Counts an error among the traps.
    pub(crate) fn note_error<R>(&self, result: wasmtime::Result<R>) -> wasmtime::Result<R> {
        if let Err(error) = &result {
            self.counts.traps.add_one(trap_kind(error));
        }
        result
    }
}

/// What ended an invocation, one of [`TRAP_KINDS`](crate::counts::TRAP_KINDS).
pub fn trap_kind(error: &wasmtime::Error) -> &'static str {
    match error.downcast_ref::<Trap>() {
        Some(Trap::StackOverflow) => "stack_overflow",
        Some(Trap::MemoryOutOfBounds) => "memory_out_of_bounds",
        Some(Trap::TableOutOfBounds) => "table_out_of_bounds",
        Some(Trap::IndirectCallToNull) => "indirect_call_to_null",
        Some(Trap::BadSignature) => "bad_signature",
        Some(Trap::IntegerOverflow) => "integer_overflow",
        Some(Trap::IntegerDivisionByZero) => "integer_division_by_zero",
        Some(Trap::UnreachableCodeReached) => "unreachable",
        Some(_) => "other_trap",
        None if error.downcast_ref::<I32Exit>().is_some() => "exit",
        None if error.is::<wasmtime::ThrownException>() => "uncaught_exception",
        None => "host_error",
    }
}

/// One task's store and instances.
pub struct Session {
    store: Store<State>,
    mode: Mode,
    module_names: Vec<String>,
    invoker: Invoker,
}

impl Session {
    /// Instantiates every one of `modules` in a new store. Guests' start functions would escape the counts: none of the
    /// guests has one.
    pub async fn new(modules: &[InstancePre<State>], mode: Mode, bed: Bed, counts: Arc<Counts>) -> Result<Self> {
        let engine = modules.first().context("a scenario has no modules")?.module().engine();
        let mut store = Store::new(
            engine,
            State {
                slow_limiter: SlowLimiter { bed: bed.clone() },
                limiter: Limiter::default(),
                bed,
                instances: Vec::new(),
                wasi: None,
            },
        );
        // Where the engine counts fuel or epochs at all, none of either is used up before a scenario says how much there is.
        let _ = store.set_fuel(u64::MAX);
        store.set_epoch_deadline(1 << 40);
        let mut module_names = Vec::new();
        for module in modules {
            let instance = match mode {
                Mode::Sync => module.instantiate(&mut store)?,
                Mode::Async => module.instantiate_async(&mut store).await?,
            };
            store.data_mut().instances.push(instance);
            module_names.push(module.module().name().unwrap_or_default().to_owned());
        }
        Ok(Self {
            store,
            mode,
            module_names,
            invoker: Invoker { counts },
        })
    }

    /// Takes down what an invocation answered.
    pub fn answer(&self, text: &str) {
        self.invoker.counts.answers.counter(text).add_one();
    }

    /// What the store's host functions find.
    pub fn state_mut(&mut self) -> &mut State {
        self.store.data_mut()
    }

    /// The task's store.
    pub fn store(&mut self) -> &mut Store<State> {
        &mut self.store
    }

    /// Where the task counts.
    pub fn counts(&self) -> &Counts {
        &self.invoker.counts
    }

    /// Counts something that only its scenario has.
    pub fn note(&self, what: &str) {
        self.counts().notes.counter(what).add_one();
    }

    /// The engine of its modules.
    pub fn engine(&self) -> Engine {
        self.store.engine().clone()
    }

    /// What counts calls, for those in stores of other makes.
    pub fn invoker(&self) -> Invoker {
        self.invoker.clone()
    }

    /// Calls `export` of the module at `index`. In sync mode the future is ready when first polled.
    ///
    /// The outer error means that the call could not be made, the inner one is how it ended.
    pub async fn call<P: WasmParams + Sync, R: WasmResults + Sync>(
        &mut self,
        index: usize,
        export: &str,
        params: P,
    ) -> Result<wasmtime::Result<R>> {
        let instance = *self
            .store
            .data()
            .instances
            .get(index)
            .context("no such module in this scenario")?;
        let function = instance.get_typed_func::<P, R>(&mut self.store, export)?;
        let key = format!("{}/{export}", self.module_names[index]);
        let invocations = self.invoker.counts.invocations.counter(&key);
        Ok(match self.mode {
            Mode::Sync => self.invoker.call(&mut self.store, &invocations, &function, params),
            Mode::Async => {
                self.invoker
                    .call_async(&mut self.store, &invocations, &function, params)
                    .await
            }
        })
    }
}
