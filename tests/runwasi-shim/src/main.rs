//! A shim of containerd that runs WebAssembly pods with wasmtime: what runwasi's own shim does, in its library's terms.

use std::fs::File;
use std::io::Read as _;

use anyhow::{Context as _, Result};
use containerd_shim_wasm::sandbox::Sandbox as Runs;
use containerd_shim_wasm::sandbox::context::RuntimeContext;
use containerd_shim_wasm::shim::{Cli as _, Shim, Version};
use wasmtime::{Config, Engine, Linker, Module, Store};
use wasmtime_wasi::preview1::{self, WasiP1Ctx};
use wasmtime_wasi::{DirPerms, FilePerms, I32Exit, WasiCtxBuilder};

/// Names, in the container's environment, a file of which a byte is read before the guest is called: the one thing that no other shim does.
const WAIT_FOR: &str = "SHIM_WAITS_FOR=";

struct TestShim;

#[derive(Default)]
struct Sandbox;

impl Shim for TestShim {
    type Sandbox = Sandbox;

    fn name() -> &'static str {
        "wasmtime"
    }

    fn version() -> Version {
        containerd_shim_wasm::shim::version!()
    }
}

impl Runs for Sandbox {
    async fn run_wasi(&self, context: &impl RuntimeContext) -> Result<i32> {
        let entry = context.entrypoint();
        let engine = Engine::new(Config::new().async_support(true))?;
        let module = Module::new(&engine, entry.source.as_bytes()?)?;
        let mut linker: Linker<WasiP1Ctx> = Linker::new(&engine);
        preview1::add_to_linker_async(&mut linker, |context| context)?;
        let mut wasi = WasiCtxBuilder::new();
        wasi.args(context.args()).inherit_stdio();
        wasi.preopened_dir("/", "/", DirPerms::all(), FilePerms::all())?;
        for (name, value) in context.envs().iter().filter_map(|variable| variable.split_once('=')) {
            wasi.env(name, value);
        }
        let mut store = Store::new(&engine, wasi.build_p1());
        let instance = linker.instantiate_async(&mut store, &module).await?;
        let function = instance
            .get_func(&mut store, &entry.func)
            .context("the guest has no such function")?;
        if let Some(path) = context
            .envs()
            .iter()
            .find_map(|variable| variable.strip_prefix(WAIT_FOR))
        {
            File::open(path)?.read_exact(&mut [0])?;
        }
        match function.call_async(&mut store, &[], &mut []).await {
            Ok(()) => Ok(0),
            Err(error) => error.downcast::<I32Exit>().map(|exit| exit.0),
        }
    }
}

fn main() {
    TestShim::run(None);
}
