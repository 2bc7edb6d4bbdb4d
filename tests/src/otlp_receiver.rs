//! A collector for tests: takes traces and metrics over OTLP/gRPC and OTLP/HTTP on one loopback port, keeps every request whole, and answers as told.

use std::convert::Infallible;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsPartialSuccess, ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::codegen::Service;

/// What the receiver does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Keeps it and says so.
    Accept,
    /// Keeps it and says that so many of its spans were rejected.
    AcceptPartly(i64),
    /// Refuses it for good (HTTP 400, gRPC `INVALID_ARGUMENT`).
    Refuse,
    /// Refuses it for now (HTTP 503, gRPC `UNAVAILABLE`).
    Unavailable,
    /// Refuses it for so many seconds (HTTP 429 with `Retry-After`, gRPC `RESOURCE_EXHAUSTED` with `RetryInfo`).
    Throttle(u8),
    /// Never answers.
    Hang,
}

/// The way a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP with a protobuf body.
    Http,
}

/// A request with metrics, as it came, whatever the answer was.
#[derive(Clone, Debug)]
pub struct ReceivedMetrics {
    /// How.
    pub transport: Transport,
    /// HTTP headers, or gRPC metadata.
    pub headers: HeaderMap,
    /// The body, unpacked.
    pub request: ExportMetricsServiceRequest,
    /// What the sender was told.
    pub answer: Answer,
}

/// A request with traces, as it came, whatever the answer was.
#[derive(Clone, Debug)]
pub struct Received {
    /// When.
    pub at: Instant,
    /// How.
    pub transport: Transport,
    /// HTTP headers, or gRPC metadata.
    pub headers: HeaderMap,
    /// The body, unpacked.
    pub request: ExportTraceServiceRequest,
    /// What the sender was told.
    pub answer: Answer,
}

/// A port on which nobody listens yet: connecting to it is refused.
#[derive(Debug)]
pub struct ReservedPort {
    socket: TcpSocket,
    address: SocketAddr,
}

/// A running receiver; stops when dropped.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    answer: Mutex<Answer>,
    received: watch::Sender<Vec<Received>>,
    metrics: watch::Sender<Vec<ReceivedMetrics>>,
}

impl ReservedPort {
    /// Takes a free loopback port.
    pub fn new() -> std::io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address })
    }

    /// Base URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Starts a receiver on it.
    pub fn listen(self, answer: Answer) -> std::io::Result<Receiver> {
        let listener = self.socket.listen(64)?;
        let shared = Arc::new(Shared {
            answer: Mutex::new(answer),
            received: watch::Sender::default(),
            metrics: watch::Sender::default(),
        });
        let task = tokio::spawn(serve(listener, Arc::clone(&shared)));
        Ok(Receiver {
            address: self.address,
            shared,
            task,
        })
    }
}

impl Receiver {
    /// Listens on a free loopback port.
    pub fn start(answer: Answer) -> std::io::Result<Self> {
        ReservedPort::new()?.listen(answer)
    }

    /// Base URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes what it does with requests from now on.
    pub fn answer(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    }

    /// Every request with metrics so far.
    pub fn metrics(&self) -> Vec<ReceivedMetrics> {
        self.shared.metrics.borrow().clone()
    }

    /// Waits until `condition` holds for the requests with metrics so far.
    pub async fn wait_for_metrics(&self, mut condition: impl FnMut(&[ReceivedMetrics]) -> bool) {
        let mut received = self.shared.metrics.subscribe();
        received
            .wait_for(|received| condition(received))
            .await
            .expect("the sender lives as long as the receiver");
    }

    /// Every request with traces so far.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.borrow().clone()
    }

    /// Waits until `condition` holds for the requests so far.
    pub async fn wait_for(&self, mut condition: impl FnMut(&[Received]) -> bool) {
        let mut received = self.shared.received.subscribe();
        received
            .wait_for(|received| condition(received))
            .await
            .expect("the sender lives as long as the receiver");
    }

    /// Spans of the requests that were accepted.
    pub fn spans(&self) -> Vec<Span> {
        let accepted = |received: &Received| matches!(received.answer, Answer::Accept | Answer::AcceptPartly(_));
        self.received()
            .into_iter()
            .filter(accepted)
            .flat_map(|received| spans(&received.request))
            .collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The spans of a request.
pub fn spans(request: &ExportTraceServiceRequest) -> Vec<Span> {
    request
        .resource_spans
        .iter()
        .flat_map(|resource| &resource.scope_spans)
        .flat_map(|scope| scope.spans.iter().cloned())
        .collect()
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(handle(request, shared).await) }
            });
            // A sender that goes away is none of the receiver's business.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn handle(request: Request<Incoming>, shared: Arc<Shared>) -> Response<Body> {
    if request.uri().path() == "/v1/traces" {
        return handle_http(request, &shared).await.map(Body::new);
    }
    if request.uri().path() == "/v1/metrics" {
        return handle_http_metrics(request, &shared).await.map(Body::new);
    }
    if request
        .uri()
        .path()
        .starts_with("/opentelemetry.proto.collector.metrics.v1.MetricsService/")
    {
        let mut grpc = MetricsServiceServer::new(GrpcService(shared)).accept_compressed(CompressionEncoding::Gzip);
        return grpc.call(request).await.unwrap_or_else(|never| match never {});
    }
    let mut grpc = TraceServiceServer::new(GrpcService(shared)).accept_compressed(CompressionEncoding::Gzip);
    grpc.call(request).await.unwrap_or_else(|never| match never {})
}

async fn handle_http(request: Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let Some(request) = decode::<ExportTraceServiceRequest>(&head.headers, body).await else {
        return respond(StatusCode::BAD_REQUEST, Bytes::new());
    };
    match shared.take(Transport::Http, head.headers, request).await {
        Answer::Refuse => respond(StatusCode::BAD_REQUEST, Bytes::new()),
        Answer::Unavailable => respond(StatusCode::SERVICE_UNAVAILABLE, Bytes::new()),
        Answer::Throttle(seconds) => throttle(seconds),
        answer => respond(StatusCode::OK, success(answer).encode_to_vec().into()),
    }
}

async fn handle_http_metrics(request: Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let Some(request) = decode::<ExportMetricsServiceRequest>(&head.headers, body).await else {
        return respond(StatusCode::BAD_REQUEST, Bytes::new());
    };
    match shared.take_metrics(Transport::Http, head.headers, request).await {
        Answer::Refuse => respond(StatusCode::BAD_REQUEST, Bytes::new()),
        Answer::Unavailable => respond(StatusCode::SERVICE_UNAVAILABLE, Bytes::new()),
        Answer::Throttle(seconds) => throttle(seconds),
        answer => respond(StatusCode::OK, metrics_success(answer).encode_to_vec().into()),
    }
}

async fn decode<T: Message + Default>(headers: &HeaderMap, body: Incoming) -> Option<T> {
    let body = body.collect().await.ok()?.to_bytes();
    let is_gzip = headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding == "gzip");
    let mut plain = Vec::new();
    if is_gzip {
        flate2::read::GzDecoder::new(&*body).read_to_end(&mut plain).ok()?;
    } else {
        plain.extend_from_slice(&body);
    }
    T::decode(&*plain).ok()
}

fn throttle(seconds: u8) -> Response<Full<Bytes>> {
    let mut response = respond(StatusCode::TOO_MANY_REQUESTS, Bytes::new());
    response.headers_mut().insert(RETRY_AFTER, u16::from(seconds).into());
    response
}

/// The same as a status of gRPC: `google.rpc.Status` with one detail.
fn throttle_status(seconds: u8) -> tonic::Status {
    let message = |number: u8, content: &[u8]| {
        let length = u8::try_from(content.len()).expect("it is short");
        [&[number << 3 | 2, length], content].concat()
    };
    let delay = message(1, &[8, seconds & 0x7f]);
    let any = [
        message(1, b"type.googleapis.com/google.rpc.RetryInfo"),
        message(2, &delay),
    ]
    .concat();
    let code = tonic::Code::ResourceExhausted;
    let details = [vec![8, code as u8], message(3, &any)].concat();
    tonic::Status::with_details(code, "later", details.into())
}

fn respond(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/x-protobuf"),
    );
    response
}

fn success(answer: Answer) -> ExportTraceServiceResponse {
    let partial_success = match answer {
        Answer::AcceptPartly(rejected_spans) => Some(ExportTracePartialSuccess {
            rejected_spans,
            error_message: "some were too old".to_owned(),
        }),
        _ => None,
    };
    ExportTraceServiceResponse { partial_success }
}

fn metrics_success(answer: Answer) -> ExportMetricsServiceResponse {
    let partial_success = match answer {
        Answer::AcceptPartly(rejected_data_points) => Some(ExportMetricsPartialSuccess {
            rejected_data_points,
            error_message: "some were too old".to_owned(),
        }),
        _ => None,
    };
    ExportMetricsServiceResponse { partial_success }
}

impl Shared {
    async fn take_metrics(
        &self,
        transport: Transport,
        headers: HeaderMap,
        request: ExportMetricsServiceRequest,
    ) -> Answer {
        let answer = *self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        self.metrics.send_modify(|received| {
            received.push(ReceivedMetrics {
                transport,
                headers,
                request,
                answer,
            });
        });
        if answer == Answer::Hang {
            std::future::pending::<()>().await;
        }
        answer
    }

    async fn take(&self, transport: Transport, headers: HeaderMap, request: ExportTraceServiceRequest) -> Answer {
        let answer = *self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        self.received.send_modify(|received| {
            received.push(Received {
                at: Instant::now(),
                transport,
                headers,
                request,
                answer,
            });
        });
        if answer == Answer::Hang {
            std::future::pending::<()>().await;
        }
        answer
    }
}

struct GrpcService(Arc<Shared>);

#[tonic::async_trait]
impl TraceService for GrpcService {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        match self.0.take(Transport::Grpc, headers, request.into_inner()).await {
            Answer::Refuse => Err(tonic::Status::invalid_argument("refused")),
            Answer::Unavailable => Err(tonic::Status::unavailable("later")),
            Answer::Throttle(seconds) => Err(throttle_status(seconds)),
            answer => Ok(tonic::Response::new(success(answer))),
        }
    }
}

#[tonic::async_trait]
impl MetricsService for GrpcService {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        match self
            .0
            .take_metrics(Transport::Grpc, headers, request.into_inner())
            .await
        {
            Answer::Refuse => Err(tonic::Status::invalid_argument("refused")),
            Answer::Unavailable => Err(tonic::Status::unavailable("later")),
            Answer::Throttle(seconds) => Err(throttle_status(seconds)),
            answer => Ok(tonic::Response::new(metrics_success(answer))),
        }
    }
}
