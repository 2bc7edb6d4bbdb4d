//! The agent's log and whoever reads it, or does not.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::tempdir;
use wasmscope_tests::agent::wasmscope;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, Workload};

/// Bytes in the pipe from which on it is as good as full (64 KiB, and a line is written whole or not at all).
const FULL: u64 = 60 * 1024;

/// Ends with the test, however that ends.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < *DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_log_that_nobody_reads_holds_nothing_up() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    let (unread, stderr) = std::io::pipe().unwrap();
    let mut command = wasmscope();
    command
        .args(["agent", "--log", "trace", "--listen", &address.to_string(), "--set"])
        .arg(format!(
            "instance.lock_file={}",
            directory.path().join("lock").display()
        ))
        .env("WASMSCOPE_GOVERNOR__ENABLED", "false")
        .stdin(Stdio::null())
        .stderr(stderr);
    let mut agent = Agent(command.spawn().unwrap());
    drop(command);
    until("it listens", || TcpStream::connect(address).is_ok());
    let get = |path: &str| http::get(&format!("http://{address}{path}"));
    let scrape = |name: &str, label: &str| {
        let file = directory.path().join("scrape.txt");
        std::fs::write(&file, get("/metrics").split_once("\r\n\r\n").unwrap().1).unwrap();
        sums(&samples::read(python, &file), name, label)
    };
    until("it is ready", || get("/readyz").starts_with("HTTP/1.1 200"));
    until("it has logged more than anybody takes", || {
        rustix::io::ioctl_fionread(&unread).unwrap() > FULL
    });

    let mut workload = Workload::ready(&["--calls", "10", "--repeat", "2"]);
    until("the workload is looked at", || {
        scrape("wasmscope_events_total", "kind").contains_key("module_published")
    });
    workload.0.send_line();
    let counted = Counts::of(&workload.0.finish().succeeded());
    until("its calls are counted", || {
        scrape("wasm_host_calls_total", "import") == counted.host_calls
    });
    assert!(get("/healthz").starts_with("HTTP/1.1 200"));

    kill_process(Pid::from_child(&agent.0), Signal::TERM).unwrap();
    until("it ends", || agent.0.try_wait().unwrap().is_some());
    assert!(agent.0.wait().unwrap().success());
}
