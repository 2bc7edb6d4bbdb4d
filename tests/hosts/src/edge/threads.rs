//! The service without an asynchronous runtime: a thread a connection, which reads requests, calls the guest and answers.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use wasmtime::{Engine, InstancePre, Linker, Module, Store};

use super::Options;
use super::guests::open_log;
use crate::report;

/// Both exports do the same: one line in the log.
const GUEST: &str = r#"(module $plain
  (import "host" "log" (func $log))
  (func (export "prepare") (call $log))
  (func (export "handle_request") (call $log))
  (func (export "_start") (call $log)))"#;

/// What the host function finds in its store.
struct State {
    log: Arc<File>,
    target: String,
}

/// Runs the guest as a command, once there is a line on standard input.
pub(super) fn run_command(options: &Options) -> Result<()> {
    let (guest, log) = load(options)?;
    let target = "command".to_owned();
    let mut store = Store::new(guest.module().engine(), State { log, target });
    let instance = guest.instantiate(&mut store)?;
    report::print_line("ready")?;
    std::io::stdin().read_line(&mut String::new())?;
    instance
        .get_typed_func::<(), ()>(&mut store, "_start")?
        .call(&mut store, ())?;
    Ok(())
}

fn load(options: &Options) -> Result<(InstancePre<State>, Arc<File>)> {
    let engine = Engine::default();
    let mut linker = Linker::new(&engine);
    linker.func_wrap(
        "host",
        "log",
        |caller: wasmtime::Caller<'_, State>| -> wasmtime::Result<()> {
            let state = caller.data();
            (&*state.log).write_all(format!("{}: request passed\n", state.target).as_bytes())?;
            Ok(())
        },
    )?;
    let guest = linker.instantiate_pre(&Module::new(&engine, GUEST)?)?;
    let log = open_log(options.log.as_deref().context("a log file has to be given")?)?;
    Ok((guest, log))
}

/// Serves until it is killed.
pub(super) fn serve(options: &Options) -> Result<()> {
    let (guest, log) = load(options)?;
    let listener = TcpListener::bind(options.listen)?;
    report::print_line(&format!("listening on {}", listener.local_addr()?))?;
    loop {
        let (connection, _) = listener.accept()?;
        let (guest, log) = (guest.clone(), log.clone());
        std::thread::spawn(move || {
            // A client that goes away is no concern of the others.
            let _ = serve_connection(&connection, &guest, &log);
        });
    }
}

fn serve_connection(connection: &TcpStream, guest: &InstancePre<State>, log: &Arc<File>) -> Result<()> {
    // As many hosts do: reading and writing through descriptors of their own.
    let mut requests = BufReader::new(connection.try_clone()?);
    let mut line = String::new();
    while requests.read_line(&mut line)? > 0 {
        let target = line.split(' ').nth(1).context("no request")?.to_owned();
        while line.trim_end() != "" {
            line.clear();
            requests.read_line(&mut line)?;
        }
        line.clear();
        let log = log.clone();
        let mut store = Store::new(guest.module().engine(), State { log, target });
        let instance = guest.instantiate(&mut store)?;
        for export in ["prepare", "handle_request"] {
            instance
                .get_typed_func::<(), ()>(&mut store, export)?
                .call(&mut store, ())?;
        }
        (&*connection).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    }
    Ok(())
}
