//! Support for the integration tests.

pub mod otlp_receiver;
