//! The guests: compiled at first use, then instantiated for each request.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tokio::sync::OnceCell;
use wasmtime::{Config, Engine, InstanceAllocationStrategy, InstancePre, Linker, Module, PoolingAllocationConfig};
use wasmtime_wasi::p1;

use super::Options;
use super::functions;
use super::request::RequestState;
use crate::counts::Counts;

/// All guests with what they share; clones are cheap.
#[derive(Clone)]
pub(super) struct Guests(Arc<Inner>);

struct Inner {
    engine: Engine,
    linker: Linker<RequestState>,
    counts: Arc<Counts>,
    data: TempDir,
    before: Duration,
    hand_over: bool,
    policy: Guest,
    transform: Guest,
    faulty: Guest,
}

/// A route's guest.
struct Guest {
    text: &'static str,
    compiled: OnceCell<InstancePre<RequestState>>,
}

impl Guest {
    fn new(text: &'static str) -> Self {
        Self {
            text,
            compiled: OnceCell::new(),
        }
    }
}

/// Which guest.
#[derive(Clone, Copy, Debug)]
pub(super) enum GuestName {
    Policy,
    Transform,
    Faulty,
}

impl Guests {
    pub(super) fn new(options: &Options) -> Result<Self> {
        let mut config = Config::new();
        if options.pooling {
            config.allocation_strategy(InstanceAllocationStrategy::Pooling(PoolingAllocationConfig::new()));
        }
        let engine = Engine::new(&config)?;
        let counts = Arc::new(Counts::default());
        let data = data_directory().context("cannot write the guests' files")?;
        let log = open_log(&options.log.clone().unwrap_or_else(|| data.path().join("edge.log")))?;

        let mut linker = Linker::new(&engine);
        p1::add_to_linker_async(&mut linker, |state: &mut RequestState| &mut state.wasi)?;
        functions::link(&mut linker, &counts, log, options.upstream())?;
        Ok(Self(Arc::new(Inner {
            engine,
            linker,
            counts,
            data,
            before: Duration::from_millis(options.before_ms),
            hand_over: options.hand_over,
            policy: Guest::new(include_str!("../../../guests/policy.wat")),
            transform: Guest::new(include_str!("../../../guests/transform.wat")),
            faulty: Guest::new(include_str!("../../../guests/faulty.wat")),
        })))
    }

    pub(super) async fn compile_all(&self) -> Result<()> {
        for name in [GuestName::Policy, GuestName::Transform, GuestName::Faulty] {
            self.get(name).await?;
        }
        Ok(())
    }

    /// The guest called `name`, which is compiled now, on this thread, if it has not been.
    pub(super) async fn get(&self, name: GuestName) -> Result<&InstancePre<RequestState>> {
        let guest = match name {
            GuestName::Policy => &self.0.policy,
            GuestName::Transform => &self.0.transform,
            GuestName::Faulty => &self.0.faulty,
        };
        let compile = || async {
            let module = Module::new(&self.0.engine, guest.text)?;
            Ok(self.0.linker.instantiate_pre(&module)?)
        };
        guest.compiled.get_or_try_init(compile).await
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.0.counts
    }

    /// How long a request waits before its guest is called.
    pub(super) fn before(&self) -> Duration {
        self.0.before
    }

    /// Whether guests run in tasks of their own.
    pub(super) fn are_handed_over(&self) -> bool {
        self.0.hand_over
    }

    /// The directory that guests see as `/`.
    pub(super) fn data(&self) -> &Path {
        self.0.data.path()
    }
}

pub(super) fn open_log(path: &Path) -> Result<Arc<File>> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    Ok(Arc::new(file.with_context(|| {
        format!("cannot open the log file {}", path.display())
    })?))
}

/// A directory with the files that guests read.
fn data_directory() -> std::io::Result<TempDir> {
    let directory = tempfile::Builder::new().prefix("edge-host-").tempdir()?;
    let article = include_str!("../../../guests/data/article.txt").repeat(4);
    std::fs::write(
        directory.path().join("policy.json"),
        include_str!("../../../guests/data/policy.json"),
    )?;
    std::fs::write(directory.path().join("article.txt"), article)?;
    std::fs::write(directory.path().join("photo.ppm"), photo())?;
    Ok(directory)
}

/// A picture of 96 by 64 pixels in the binary PPM format: a sky with a sun in it.
fn photo() -> Vec<u8> {
    let mut image = b"P6 96 64 255\n".to_vec();
    for row in 0..64_i32 {
        for column in 0..96_i32 {
            let distance = (row - 20).pow(2) + (column - 60).pow(2);
            let pixel = if distance < 100 {
                [250, 220, 90]
            } else {
                [(row * 2) as u8, (90 + row) as u8, 200]
            };
            image.extend(pixel);
        }
    }
    image
}
