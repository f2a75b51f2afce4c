//! A small HTTP server for tests. One closure answers all requests on any number of connections.
#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use base64::Engine as _;

/// A request.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub method: String,
    /// Path as sent, without the query.
    pub path: String,
    pub query: String,
    /// Headers; names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
    /// Whether the connection ended before the body was complete.
    pub cut: bool,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Returns the values of a query parameter, unescaped.
    pub fn all(&self, name: &str) -> Vec<String> {
        self.query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .filter(|(n, _)| *n == name)
            .map(|(_, v)| unescape(&v.replace('+', " ")))
            .collect()
    }

    pub fn one(&self, name: &str) -> Option<String> {
        self.all(name).pop()
    }

    /// Returns user and password of `Authorization: Basic`.
    pub fn basic(&self) -> Option<(String, String)> {
        let encoded = self.header("authorization").strip_prefix("Basic ")?;
        let raw = base64::engine::general_purpose::STANDARD
            .decode(encoded)
            .ok()?;
        let text = String::from_utf8(raw).ok()?;
        let (user, password) = text.split_once(':')?;
        Some((user.to_owned(), password.to_owned()))
    }

    pub fn bearer(&self) -> Option<&str> {
        self.header("authorization").strip_prefix("Bearer ")
    }
}

pub fn unescape(text: &str) -> String {
    percent_encoding::percent_decode_str(text)
        .decode_utf8_lossy()
        .into_owned()
}

/// A response.
#[derive(Clone, Debug, Default)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// How slowly it is sent, if not at once.
    pub slow: Option<Slow>,
}

/// How a slow response is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slow {
    /// Not at all, until the server ends.
    Never,
    /// The head, and then one byte of an endless body every now and then.
    Drip,
    /// After this time.
    After(Duration),
}

impl Response {
    pub fn new(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn json(status: u16, document: &serde_json::Value) -> Self {
        Self::new(status)
            .with("Content-Type", "application/json")
            .body(document.to_string())
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, v)| v.as_str())
    }
}

type Handler = dyn Fn(Request) -> Response + Send + Sync;

/// A running server, which is stopped when dropped.
pub struct Server {
    pub address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(
        handler: impl Fn(Request) -> Response + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let (handler, over): (Arc<Handler>, _) = (Arc::new(handler), Arc::clone(&ended));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(stream) = stream {
                    let handler = Arc::clone(&handler);
                    let over = Arc::clone(&over);
                    std::thread::spawn(move || drop(serve(&stream, &*handler, &over)));
                }
            }
        });
        Ok(Self {
            address,
            ended,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Sends a slow response. Returns whether the response is still to be sent.
fn delay(stream: &TcpStream, slow: Slow, over: &AtomicBool) -> std::io::Result<bool> {
    let (mut out, step) = (stream, Duration::from_millis(200));
    match slow {
        Slow::After(time) => {
            std::thread::sleep(time);
            return Ok(true);
        }
        Slow::Never => {}
        Slow::Drip => out.write_all(b"HTTP/1.1 200 x\r\nContent-Length: 1000000\r\n\r\n")?,
    }
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(step);
        if slow == Slow::Drip {
            out.write_all(b" ")?;
        }
    }
    Ok(false)
}

fn serve(stream: &TcpStream, handler: &Handler, over: &AtomicBool) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader)? {
        let head = request.method == "HEAD";
        let cut = request.cut;
        let last = request.header("connection").eq_ignore_ascii_case("close");
        let answer = handler(request);
        if cut {
            return Ok(());
        }
        if let Some(slow) = answer.slow
            && !delay(stream, slow, over)?
        {
            return Ok(());
        }
        let mut text = format!("HTTP/1.1 {} x\r\n", answer.status);
        for (name, value) in &answer.headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        if answer.header("content-length").is_none() && answer.status != 204 {
            text.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        if !head && answer.status != 204 {
            bytes.extend_from_slice(&answer.body);
        }
        let mut out = stream;
        out.write_all(&bytes)?;
        if last {
            break;
        }
    }
    Ok(())
}

fn read(from: &mut BufReader<&TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        ..Request::default()
    };
    // A TLS handshake; this server has no TLS.
    if request.path.is_empty() {
        return Ok(None);
    }
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                let (name, value) = (name.to_ascii_lowercase(), value.trim().to_owned());
                request.headers.insert(name, value);
            }
            None => break,
        }
    }
    let body = if request.header("transfer-encoding") == "chunked" {
        chunks(from, &mut request.body)
    } else {
        let length = request.header("content-length").parse().unwrap_or(0);
        request.body.resize(length, 0);
        from.read_exact(&mut request.body)
    };
    request.cut = body.is_err();
    Ok(Some(request))
}

fn chunks(from: &mut BufReader<&TcpStream>, body: &mut Vec<u8>) -> std::io::Result<()> {
    loop {
        let mut line = String::new();
        from.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        let at = body.len();
        body.resize(at + size, 0);
        if let Err(e) = from.read_exact(&mut body[at..]) {
            body.truncate(at);
            return Err(e);
        }
        let mut end = [0; 2];
        from.read_exact(&mut end)?;
        if size == 0 {
            return Ok(());
        }
    }
}
