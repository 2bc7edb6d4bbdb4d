//! The kubelet's authenticated port: TLS with a CA of its own, and a token.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use wasmscope::place::kubelet::{Kubelet, KubeletOptions};
use wasmscope::span::Place;
use wasmscope_tests::environment::left_out;

const PODS: &str = r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[{
    "metadata":{"name":"edge","namespace":"shop","uid":"u1"},"spec":{"containers":[]}}]}"#;

/// What was asked, with what in `Authorization`.
type Asked = Arc<Mutex<Vec<(String, String)>>>;

/// A self-signed certificate for 127.0.0.1 with its key.
fn certificate(directory: &Path, name: &str) -> Option<(PathBuf, PathBuf)> {
    let [certificate, key] = ["crt", "key"].map(|end| directory.join(format!("{name}.{end}")));
    let mut openssl = Command::new("openssl");
    openssl
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=kubelet", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-out")
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key);
    let Ok(output) = openssl.output() else {
        left_out("openssl is not installed (cargo xtask setup --tests)");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some((certificate, key))
}

async fn serve(certificate: &Path, key: &Path) -> (String, Asked) {
    let chain = vec![CertificateDer::from_pem_file(certificate).unwrap()];
    let key = PrivateKeyDer::from_pem_file(key).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let asked = Asked::default();
    let noted = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, noted) = (acceptor.clone(), noted.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let header = request
                        .headers()
                        .get("authorization")
                        .map(|value| value.as_bytes().to_vec());
                    let header = String::from_utf8(header.unwrap_or_default()).unwrap();
                    noted.lock().unwrap().push((request.uri().path().to_owned(), header));
                    async { Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from_static(PODS.as_bytes())))) }
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
            });
        }
    });
    (url, asked)
}

#[tokio::test]
async fn the_token_is_shown_only_to_a_kubelet_whose_certificate_is_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let Some((own, key)) = certificate(directory.path(), "own") else {
        return;
    };
    let Some((other, _)) = certificate(directory.path(), "other") else {
        return;
    };
    let token_file = directory.path().join("token");
    std::fs::write(&token_file, "secret-token").unwrap();
    let (url, asked) = serve(&own, &key).await;
    let place = Place {
        pod_uid: Some("u1".to_owned()),
        ..Place::default()
    };
    let options = |ca_file: Option<PathBuf>, insecure_skip_verify| KubeletOptions {
        url: url.clone(),
        token_file: Some(token_file.clone()),
        ca_file,
        insecure_skip_verify,
    };

    let kubelet = Kubelet::new(&options(Some(other), false)).unwrap();
    assert!(kubelet.pod_of(&place).await.is_err());
    assert_eq!(*asked.lock().unwrap(), [], "nothing is said to a stranger");

    for options in [options(Some(own), false), options(None, true)] {
        let kubelet = Kubelet::new(&options).unwrap();
        let pod = kubelet.pod_of(&place).await.unwrap().unwrap();
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("shop", "edge"));
        let expected = ("/pods".to_owned(), "Bearer secret-token".to_owned());
        assert_eq!(asked.lock().unwrap().drain(..).collect::<Vec<_>>(), [expected]);
    }
}
