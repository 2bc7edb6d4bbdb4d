//! Traces that leave the agent over TLS: who is trusted, who proves what, and what files that are wrong cost.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

// Not all of its helpers are needed here.
#[allow(dead_code, reason = "shared with other tests")]
mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use support::{ANCHOR, config, sample_trace, wait_until};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};
use wasmscope::sink::otlp::{ExportCounts, Exporter, ExporterConfig, Protocol};
use wasmscope::sink::otlp_config::TlsConfig;
use wasmscope_tests::otlp_receiver::{Answer, Receiver};

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];
const LONG: Duration = Duration::from_secs(30);

/// Two authorities that know nothing of each other; the first has signed a server and a client.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let openssl = |arguments: &str| {
            let output = Command::new("openssl")
                .args(arguments.split(' '))
                .current_dir(directory.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        for authority in ["ca", "stranger"] {
            openssl(&format!(
                "req -x509 {key} -keyout {authority}.key -out {authority}.pem -subj /CN={authority} -days 2"
            ));
        }
        std::fs::write(
            directory.path().join("extensions"),
            "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
        )
        .unwrap();
        for name in ["server", "client"] {
            openssl(&format!(
                "req -new {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"
            ));
            openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile extensions"
            ));
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn chain(&self, name: &str) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_file_iter(self.path(name))
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    /// Ends TLS before `plain`; answers only who has a certificate of the authority if `is_mutual`.
    async fn serve(&self, plain: &str, protocol: Protocol, is_mutual: bool) -> SocketAddr {
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if is_mutual {
            let mut roots = RootCertStore::empty();
            roots.add(self.chain("ca.pem").remove(0)).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).unwrap();
        let mut server = builder.with_single_cert(self.chain("server.pem"), key).unwrap();
        server.alpn_protocols = match protocol {
            Protocol::Grpc => vec![b"h2".to_vec()],
            Protocol::HttpProtobuf => vec![b"http/1.1".to_vec()],
        };
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let plain = plain.trim_start_matches("http://").to_owned();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, plain) = (acceptor.clone(), plain.clone());
                tokio::spawn(async move {
                    let Ok(mut outside) = acceptor.accept(stream).await else {
                        return;
                    };
                    let mut inside = TcpStream::connect(plain).await.unwrap();
                    // Whoever closes first, nobody is told.
                    let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
                });
            }
        });
        address
    }
}

fn secured(address: SocketAddr, protocol: Protocol, ca: &Path) -> ExporterConfig {
    let mut config = config(&format!("https://{address}"), protocol);
    config.target.tls.ca_file = Some(ca.to_owned());
    config
}

async fn export(config: &ExporterConfig) -> ExportCounts {
    let exporter = Exporter::start(config, ANCHOR).unwrap();
    exporter.offer(Arc::new(sample_trace(1)));
    exporter.shutdown(LONG).await
}

#[tokio::test]
async fn a_collector_whose_authority_is_trusted_gets_the_traces() {
    let certificates = Certificates::new();
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let address = certificates.serve(&receiver.endpoint(), protocol, false).await;
        let mut config = secured(address, protocol, &certificates.path("ca.pem"));
        config.target.headers.insert("x-token".to_owned(), "100%".to_owned());
        assert_eq!(export(&config).await.exported, 1, "{protocol:?}");
        assert_eq!(receiver.spans().len(), 4);
        assert_eq!(receiver.received()[0].headers.get("x-token").unwrap(), "100%");
    }
}

#[tokio::test]
async fn a_collector_that_wants_a_certificate_gets_ours() {
    let certificates = Certificates::new();
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let address = certificates.serve(&receiver.endpoint(), protocol, true).await;
        let mut config = secured(address, protocol, &certificates.path("ca.pem"));
        config.target.timeout_ms = 300;
        assert_eq!(export(&config).await.lost_export_failed, 1, "{protocol:?}");
        config.target.timeout_ms = 10_000;
        config.target.tls = TlsConfig {
            cert_file: Some(certificates.path("client.pem")),
            key_file: Some(certificates.path("client.key")),
            ..config.target.tls
        };
        assert_eq!(export(&config).await.exported, 1, "{protocol:?}");
    }
}

#[tokio::test]
async fn certificates_that_are_renewed_are_used_without_a_restart_and_wrong_ones_change_nothing() {
    let certificates = Certificates::new();
    let file = |name: &str| certificates.path(name);
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let address = certificates.serve(&receiver.endpoint(), protocol, true).await;
        // As a secret that is mounted: a link to what is valid now.
        let replace = |name: &str, target: &str| {
            let next = file("next");
            std::os::unix::fs::symlink(file(target), &next).unwrap();
            std::fs::rename(next, file(name)).unwrap();
        };
        replace("mine.pem", "stranger.pem");
        replace("mine.key", "stranger.key");
        let mut config = secured(address, protocol, &certificates.path("ca.pem"));
        config.target.timeout_ms = 2_000;
        config.batch_delay = Duration::from_millis(1);
        config.max_pause = Duration::from_millis(1);
        config.target.tls.cert_file = Some(file("mine.pem"));
        config.target.tls.key_file = Some(file("mine.key"));
        let exporter = Exporter::start(&config, ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(1)));
        wait_until(|| exporter.counts().lost_export_failed == 1).await;
        replace("mine.pem", "client.pem");
        replace("mine.key", "client.key");
        exporter.offer(Arc::new(sample_trace(2)));
        wait_until(|| exporter.counts().exported == 1).await;
        std::fs::write(file("broken"), "half of a certif").unwrap();
        replace("mine.pem", "broken");
        exporter.offer(Arc::new(sample_trace(3)));
        let counts = exporter.shutdown(LONG).await;
        assert_eq!((counts.offered, counts.exported), (3, 2), "{protocol:?}");
    }
}

#[tokio::test]
async fn a_collector_that_is_not_trusted_gets_nothing_and_the_loss_is_counted_and_logged_once() {
    let certificates = Certificates::new();
    let logs = support::Logs::default();
    let _guard = logs.capture();
    for (protocol, line_count) in PROTOCOLS.into_iter().zip(1..) {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let address = certificates.serve(&receiver.endpoint(), protocol, false).await;
        let mut config = secured(address, protocol, &certificates.path("stranger.pem"));
        config.target.timeout_ms = 200;
        let exporter = Exporter::start(&config, ANCHOR).unwrap();
        for lost_count in 1..=3 {
            exporter.offer(Arc::new(sample_trace(1)));
            wait_until(|| exporter.counts().lost_export_failed == lost_count).await;
        }
        let counts = exporter.shutdown(LONG).await;
        assert_eq!((counts.offered, counts.lost_export_failed), (3, 3), "{protocol:?}");
        assert!(receiver.received().is_empty());
        let lines = logs.lines();
        assert_eq!(lines.len(), line_count, "{lines:#?}");
        assert!(lines[line_count - 1].contains("cannot be exported"), "{lines:#?}");
    }
}

#[tokio::test]
async fn files_that_are_missing_or_not_pem_are_named_at_the_start() {
    let certificates = Certificates::new();
    let nonsense = certificates.path("nonsense.pem");
    std::fs::write(&nonsense, "nonsense").unwrap();
    for protocol in PROTOCOLS {
        for (tls, key, file) in [
            (
                TlsConfig {
                    ca_file: Some(nonsense.clone()),
                    ..TlsConfig::default()
                },
                "tls.ca_file",
                "nonsense.pem",
            ),
            (
                TlsConfig {
                    ca_file: Some(certificates.path("absent")),
                    ..TlsConfig::default()
                },
                "tls.ca_file",
                "absent",
            ),
            (
                TlsConfig {
                    ca_file: Some(certificates.path("ca.pem")),
                    cert_file: Some(certificates.path("client.pem")),
                    key_file: Some(nonsense.clone()),
                },
                "tls.key_file",
                "nonsense.pem",
            ),
        ] {
            let mut config = config("https://127.0.0.1:1", protocol);
            config.target.tls = tls;
            let error = Exporter::start(&config, ANCHOR).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(file), "{error}");
        }
    }
}
