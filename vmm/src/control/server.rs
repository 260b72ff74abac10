//! The colony's end of the control socket: one thread that serves all connections.
//!
//! Who may speak is asked of the socket: the process's own user, and root. At the end no request is cut
//! off: the server first stops listening, then closes each connection that waits for a request, and gives
//! the others a while for what they are being answered.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::{convert::Infallible, io};

use axum::Router;
use axum::http::StatusCode;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::error::Problem;
use super::routes;
use super::service::Service;

/// Connections served at one time. Each keeps one thread busy at the most.
const MOST_CONNECTIONS: usize = 256;
/// How long a connection may take to say what it wants, or wait between two requests.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long those who are being answered may take to read the rest.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long a thread that waited for a VM stays for the next who asks.
const THREAD_LIMIT: Duration = Duration::from_secs(1);
/// How long to wait where the host has no descriptor left.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// A running server.
pub(super) struct Server {
    end: oneshot::Sender<Infallible>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Serves whoever connects to `listener`, in a thread of its own.
    pub(super) fn start(service: Arc<Service>, listener: UnixListener) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        builder.enable_all().thread_name("client").thread_keep_alive(THREAD_LIMIT);
        let runtime = builder.max_blocking_threads(MOST_CONNECTIONS).build()?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let router = routes::router(service);
        let (end, ended) = oneshot::channel();
        let run = move || serve(runtime, &listener, &router, ended);
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(run)?;
        Ok(Self { end, thread })
    }

    /// Ends in order.
    pub(super) fn end(self) {
        drop(self.end);
        if self.thread.join().is_err() {
            tracing::error!("the control socket's thread panicked");
        }
    }
}

fn serve(
    runtime: Runtime,
    listener: &tokio::net::UnixListener,
    router: &Router,
    ended: oneshot::Receiver<Infallible>,
) {
    runtime.block_on(async {
        let connections = GracefulShutdown::new();
        tokio::select! {
            () = accept(listener, router, &connections) => {}
            _ = ended => {}
        }
        if tokio::time::timeout(ANSWER_LIMIT, connections.shutdown()).await.is_err() {
            tracing::debug!("a client does not read its answer");
        }
    });
    // A thread that waits for a VM's process is not waited for: that process is gone, or killed.
    runtime.shutdown_background();
}

/// For as long as the server lives.
async fn accept(listener: &tokio::net::UnixListener, router: &Router, connections: &GracefulShutdown) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (router, permit) = match admit(&stream, &room) {
                    Ok(permit) => (router.clone(), Some(permit)),
                    Err(problem) => (refusing(problem), None),
                };
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(REQUEST_LIMIT);
                builder.keep_alive(permit.is_some());
                let handler = TowerToHyperService::new(router);
                let connection = builder.serve_connection(TokioIo::new(stream), handler);
                let connection = connections.watch(connection);
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a client has gone");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a client cannot be served");
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
        }
    }
}

/// Whether this connection is served.
fn admit(stream: &UnixStream, room: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Problem> {
    let failed = |error: io::Error| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", format!("who asks is not known: {error}"))
    };
    let peer = stream.peer_cred().map_err(failed)?.uid();
    if peer != rustix::process::geteuid().as_raw() && peer != 0 {
        let detail = format!("this colony is not one of user {peer}");
        return Err(Problem::new(StatusCode::FORBIDDEN, "not-yours", detail));
    }
    Arc::clone(room).try_acquire_owned().map_err(|_| {
        let detail = format!("{MOST_CONNECTIONS} connections are open: try again when one has ended");
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", detail)
    })
}

/// Answers everything with a problem.
fn refusing(problem: Problem) -> Router {
    Router::new().fallback(|| async { problem })
}
