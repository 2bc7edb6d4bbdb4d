//! Support for the integration tests.

pub mod agent;
pub mod captured;
pub mod containerd;
pub mod daemon_set;
pub mod dashboards;
pub mod environment;
pub mod http;
pub mod load;
pub mod node_agent;
pub mod otlp_receiver;
pub mod prometheus;
pub mod running;
pub mod samples;
pub mod workload;
