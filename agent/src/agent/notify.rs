//! Tells systemd how the agent is, where systemd has asked (`sd_notify(3)`).

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// What ending takes after the deadline.
const EXIT: Duration = Duration::from_secs(5);

/// Sends `state`, such as `READY=1`. Nobody listens, or nobody asked: nothing happens.
pub(super) fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// The agent ends within `deadline`, and systemd is to wait for so long, whatever its unit says.
pub(super) fn stopping(deadline: Duration) {
    let microseconds = (deadline + EXIT).as_micros();
    notify(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={microseconds}"));
}

/// How often systemd wants to hear from the agent: half of its limit.
pub(super) fn watchdog_interval() -> Option<Duration> {
    let microseconds: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    let is_ours = std::env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
    (is_ours && microseconds > 1).then(|| Duration::from_micros(microseconds / 2))
}
