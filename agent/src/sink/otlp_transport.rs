//! The connection to an OpenTelemetry collector, plain or with TLS: all that the signals have in common.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{HttpClient, HttpError};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::otlp::Protocol;
use super::otlp_config::{TargetConfig, TlsConfig};
use super::otlp_throttle::Throttle;

/// Largest PEM file that is read, bytes.
const MAX_PEM_BYTES: u64 = 4 << 20;

/// Why there can be no connection to a collector, whoever it is.
#[derive(Debug, Error)]
pub enum TransportError {
    /// A file for TLS cannot be read.
    #[error("cannot read {path} (tls.{key}): {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The key that names it.
        key: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A file for TLS holds something else.
    #[error("{path} (tls.{key}) has no {what} as PEM")]
    NotPem {
        /// The file.
        path: PathBuf,
        /// The key that names it.
        key: &'static str,
        /// What should be in it.
        what: &'static str,
    },
    /// TLS cannot be set up with what the files hold.
    #[error("cannot set TLS up: {0}")]
    Tls(String),
    /// The endpoint is no URL.
    #[error("{endpoint} is not the URL of a collector: {reason}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// A header cannot be sent. Its value is not repeated, it may be a secret.
    #[error("the header {0:?} cannot be sent: its name or its value has characters that headers cannot have")]
    Header(String),
}

/// The base URL, with the protocol's customary port on this host as the default.
pub(crate) fn endpoint(target: &TargetConfig) -> &str {
    target
        .endpoint
        .as_deref()
        .filter(|endpoint| !endpoint.is_empty())
        .unwrap_or(match target.protocol {
            Protocol::Grpc => "http://localhost:4317",
            Protocol::HttpProtobuf => "http://localhost:4318",
        })
}

/// The same for logs: what follows the path may be a secret.
pub(crate) fn shown_endpoint(target: &TargetConfig) -> String {
    without_query(endpoint(target))
}

/// Replaces what an URL has after its path, for logs and prints.
pub(crate) fn without_query(url: &str) -> String {
    match url.split_once(['?', '#']) {
        Some((path, _)) => format!("{path}?***"),
        None => url.to_owned(),
    }
}

/// Reads and parses the files for TLS, if they would be used.
pub(crate) fn check_files(target: &TargetConfig) -> Result<(), TransportError> {
    if target.is_set() && endpoint(target).starts_with("https:") {
        client_config(&target.tls)?;
    }
    Ok(())
}

/// Where HTTP sends a signal (`traces`, `metrics`).
pub(crate) fn url(target: &TargetConfig, signal: &str) -> Result<http::Uri, TransportError> {
    let base = endpoint(target);
    let url = if target.endpoint_is_complete {
        base.to_owned()
    } else {
        let (path, query) = base.find('?').map_or((base, ""), |at| base.split_at(at));
        format!("{}/v1/{signal}{query}", path.trim_end_matches('/'))
    };
    url.parse()
        .map_err(|error: http::uri::InvalidUri| TransportError::Endpoint {
            endpoint: shown_endpoint(target),
            reason: error.to_string(),
        })
}

/// The configured headers.
pub(crate) fn headers(target: &TargetConfig) -> Result<HeaderMap, TransportError> {
    let wrong = |name: &str| TransportError::Header(name.to_owned());
    target
        .headers
        .iter()
        .map(|(name, value)| {
            let mut value = HeaderValue::from_str(value).map_err(|_| wrong(name))?;
            value.set_sensitive(true);
            let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong(name))?;
            Ok((header, value))
        })
        .collect()
}

/// A gRPC channel that connects when it is first used.
pub(crate) fn channel(target: &TargetConfig) -> Result<Channel, TransportError> {
    let address = endpoint(target);
    let wrong = |error: tonic::transport::Error| TransportError::Endpoint {
        endpoint: shown_endpoint(target),
        reason: chain(&error),
    };
    let mut endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(wrong)?
        .timeout(timeout(target))
        .connect_timeout(timeout(target));
    if address.starts_with("https:") {
        // For its errors, which name the file.
        client_config(&target.tls)?;
        let mut tls = ClientTlsConfig::new();
        tls = match &target.tls.ca_file {
            Some(path) => tls.ca_certificate(Certificate::from_pem(read(path, "ca_file")?)),
            None => tls.with_native_roots(),
        };
        if let (Some(cert), Some(key)) = (&target.tls.cert_file, &target.tls.key_file) {
            tls = tls.identity(Identity::from_pem(read(cert, "cert_file")?, read(key, "key_file")?));
        }
        endpoint = endpoint
            .tls_config(tls)
            .map_err(|error| TransportError::Tls(chain(&error)))?;
    }
    Ok(endpoint.connect_lazy())
}

/// Adds the configured headers to gRPC requests.
#[derive(Clone, Debug)]
pub(crate) struct AddHeaders(pub(crate) HeaderMap);

impl tonic::service::Interceptor for AddHeaders {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let mut all = std::mem::take(request.metadata_mut()).into_headers();
        all.extend(self.0.clone());
        *request.metadata_mut() = tonic::metadata::MetadataMap::from_headers(all);
        Ok(request)
    }
}

/// Sends HTTP requests, with the configured headers.
#[derive(Debug)]
pub(crate) struct Http {
    client: HyperClient<HttpsConnector<HttpConnector>>,
    headers: HeaderMap,
    throttle: Arc<Throttle>,
}

impl Http {
    /// What the collector says of when to come back is noted in `throttle`.
    pub(crate) fn new(target: &TargetConfig, throttle: Arc<Throttle>) -> Result<Self, TransportError> {
        let tls = if endpoint(target).starts_with("https:") {
            client_config(&target.tls)?
        } else {
            // Never used: the trust of nobody is enough.
            builder()?
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth()
        };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        Ok(Self {
            client: HyperClient::new(connector, timeout(target), None),
            headers: headers(target)?,
            throttle,
        })
    }
}

#[tonic::async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, mut request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        if let Some(until) = self.throttle.until() {
            // The library may not have understood for how long.
            tokio::time::sleep_until(until).await;
        }
        request.headers_mut().extend(self.headers.clone());
        let answer = self.client.send_bytes(request).await;
        let answer = answer.map_err(|error| HttpError::from(chain(&*error)))?;
        self.throttle.note_answer(answer.status(), answer.headers());
        Ok(answer)
    }
}

/// For a request with all its retries.
pub(crate) fn timeout(target: &TargetConfig) -> Duration {
    Duration::from_millis(target.timeout_ms)
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TransportError> {
    // Named, for there may be several providers in one program.
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| TransportError::Tls(error.to_string()))
}

fn client_config(tls: &TlsConfig) -> Result<ClientConfig, TransportError> {
    let mut roots = rustls::RootCertStore::empty();
    if let Some(path) = &tls.ca_file {
        for certificate in certificates(path, "ca_file")? {
            roots
                .add(certificate)
                .map_err(|error| TransportError::Tls(format!("{} (tls.ca_file): {error}", path.display())))?;
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(TransportError::Tls(
                "this system trusts no authority; name one in tls.ca_file".to_owned(),
            ));
        }
    }
    let builder = builder()?.with_root_certificates(roots);
    let (Some(cert), Some(key)) = (&tls.cert_file, &tls.key_file) else {
        return Ok(builder.with_no_client_auth());
    };
    let private = PrivateKeyDer::from_pem_slice(&read(key, "key_file")?).map_err(|_| TransportError::NotPem {
        path: key.clone(),
        key: "key_file",
        what: "private key",
    })?;
    builder
        .with_client_auth_cert(certificates(cert, "cert_file")?, private)
        .map_err(|error| TransportError::Tls(format!("{} and {}: {error}", cert.display(), key.display())))
}

fn certificates(path: &Path, key: &'static str) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let text = read(path, key)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    found
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(|| TransportError::NotPem {
            path: path.to_owned(),
            key,
            what: "certificate",
        })
}

fn read(path: &Path, key: &'static str) -> Result<Vec<u8>, TransportError> {
    use std::io::Read as _;
    let mut content = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_PEM_BYTES).read_to_end(&mut content))
        .map_err(|source| TransportError::Read {
            path: path.to_owned(),
            key,
            source,
        })?;
    Ok(content)
}

/// An error with its causes: those of HTTP clients say what went wrong only there.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
