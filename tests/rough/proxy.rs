//! The world between here and a registry: a proxy that spoils requests and answers as it is told.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What becomes of one request.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    None,
    /// The connection is cut when so many bytes of the body have gone through.
    CutRequest(u64),
    /// It is cut when so many bytes of the answer have.
    CutAnswer(u64),
    /// Answered here: status, and further lines of the head.
    Say(u16, String),
    /// Nothing comes back, and nothing goes on.
    BlackHole,
    /// Bytes a second, upwards.
    Slow(u64),
    /// `Docker-Content-Digest` of the answer is another.
    WrongDigest,
    /// The answer's body ends early, and its length says that this is all.
    ShortBody,
}

/// A request that came by.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub headers: BTreeMap<String, String>,
    /// Bytes of the body that came.
    pub bytes: u64,
    pub fault: Fault,
    /// 0 where there was no answer.
    pub status: u16,
}

type Plan = dyn Fn(&str, &str, u64) -> Fault + Send + Sync;

pub struct Proxy {
    pub address: SocketAddr,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    ended: Arc<AtomicBool>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
    }
}

impl Proxy {
    /// `plan` is asked with method, target and the number of the request.
    pub fn start(
        upstream: SocketAddr,
        plan: impl Fn(&str, &str, u64) -> Fault + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (seen, ended) = (
            Arc::new(Mutex::new(Vec::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let count = Arc::new(AtomicU64::new(0));
        let (plan, log, over): (Arc<Plan>, _, _) =
            (Arc::new(plan), Arc::clone(&seen), Arc::clone(&ended));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(client) = client else { continue };
                let (plan, log, count, over) = (
                    Arc::clone(&plan),
                    Arc::clone(&log),
                    Arc::clone(&count),
                    Arc::clone(&over),
                );
                std::thread::spawn(move || {
                    let _ = client.set_nodelay(true);
                    let mut reader = BufReader::new(&client);
                    while let Ok(true) =
                        relay(&client, &mut reader, upstream, &*plan, &log, &count, &over)
                    {
                    }
                    let _ = client.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        Ok(Self {
            address,
            seen,
            ended,
        })
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

type Head = (String, Vec<(String, String)>);

fn head(from: &mut impl BufRead) -> std::io::Result<Option<Head>> {
    let mut first = String::new();
    if from.read_line(&mut first)? == 0 || first.len() < 3 || !first.is_ascii() {
        return Ok(None);
    }
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_owned(), value.trim().to_owned())),
            None => return Ok(Some((first.trim_end().to_owned(), headers))),
        }
    }
}

fn value<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
    found.map(|(_, v)| v.as_str())
}

/// One request; false: the connection is over.
fn relay(
    client: &TcpStream,
    reader: &mut BufReader<&TcpStream>,
    upstream: SocketAddr,
    plan: &Plan,
    log: &Mutex<Vec<Seen>>,
    count: &AtomicU64,
    over: &AtomicBool,
) -> std::io::Result<bool> {
    let Some((first, headers)) = head(reader)? else {
        return Ok(false);
    };
    let mut words = first.split(' ');
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let fault = plan(method, target, count.fetch_add(1, Ordering::SeqCst));
    let lowered = headers
        .iter()
        .map(|(n, v)| (n.to_ascii_lowercase(), v.clone()));
    let entry = Seen {
        method: method.to_owned(),
        headers: lowered.collect(),
        bytes: 0,
        fault: fault.clone(),
        status: 0,
    };
    let index = {
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        log.push(entry);
        log.len() - 1
    };
    let note = |change: &dyn Fn(&mut Seen)| {
        change(&mut log.lock().unwrap_or_else(PoisonError::into_inner)[index]);
    };
    let mut out = client;
    match &fault {
        Fault::Say(status, more) => {
            note(&|seen| seen.status = *status);
            let text = format!(
                "HTTP/1.1 {status} x\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n"
            );
            out.write_all(text.as_bytes())?;
            // Read on for a while: a connection that is closed over unread bytes is reset, and the answer lost.
            client.set_read_timeout(Some(Duration::from_millis(200)))?;
            let _ = std::io::copy(&mut reader.take(1 << 20), &mut std::io::sink());
            return Ok(false);
        }
        Fault::BlackHole => {
            client.set_read_timeout(Some(Duration::from_millis(100)))?;
            let mut buffer = [0; 4096];
            while !over.load(Ordering::SeqCst) {
                match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Err(e)
                        if !matches!(
                            e.kind(),
                            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                        ) =>
                    {
                        break;
                    }
                    _ => {}
                }
            }
            return Ok(false);
        }
        _ => {}
    }
    let Ok(mut server) = TcpStream::connect(upstream) else {
        return Ok(false);
    };
    let mut text = format!("{first}\r\n");
    for (name, value) in &headers {
        if !name.eq_ignore_ascii_case("connection") {
            text.extend([name, ": ", value, "\r\n"]);
        }
    }
    text.push_str("Connection: close\r\n\r\n");
    server.write_all(text.as_bytes())?;

    let mut limit = match fault {
        Fault::CutRequest(after) => after,
        _ => u64::MAX,
    };
    let mut whole = true;
    let mut pass = |bytes: &[u8], is_body: bool| -> bool {
        if is_body {
            if let Fault::Slow(rate) = fault {
                std::thread::sleep(Duration::from_secs_f64(bytes.len() as f64 / rate as f64));
            }
            note(&|seen| seen.bytes += bytes.len() as u64);
        }
        let n = (bytes.len() as u64).min(limit) as usize;
        limit -= if is_body { n as u64 } else { 0 };
        // A server that has answered already takes no more, which is its right.
        let _ = server.write_all(&bytes[..n]);
        n == bytes.len()
    };
    if value(&headers, "transfer-encoding").is_some() {
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(false);
            }
            let size = u64::from_str_radix(line.trim(), 16).unwrap_or(0);
            pass(line.as_bytes(), false);
            whole = copy(reader, size, &mut |bytes| pass(bytes, true))?;
            if !whole {
                break;
            }
            let mut end = [0; 2];
            reader.read_exact(&mut end)?;
            pass(&end, false);
            if size == 0 {
                break;
            }
        }
    } else if let Some(size) = value(&headers, "content-length").and_then(|n| n.parse().ok()) {
        whole = copy(reader, size, &mut |bytes| pass(bytes, true))?;
    }
    if !whole || matches!(fault, Fault::CutRequest(_)) {
        let _ = server.shutdown(std::net::Shutdown::Both);
        return Ok(false);
    }

    let mut answer = BufReader::new(&server);
    let Some((first, mut headers)) = head(&mut answer)? else {
        return Ok(false);
    };
    let mut body = Vec::new();
    if method != "HEAD" {
        answer.read_to_end(&mut body)?;
    }
    let status = first
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    note(&|seen| seen.status = status);
    if fault == Fault::WrongDigest
        && let Some((_, value)) = headers
            .iter_mut()
            .find(|(n, _)| n.eq_ignore_ascii_case("docker-content-digest"))
    {
        *value = format!("sha256:{}", "0".repeat(64));
    }
    if fault == Fault::ShortBody && value(&headers, "content-length").is_some() && method != "HEAD"
    {
        body.truncate(body.len() / 2);
        let length = body.len().to_string();
        if let Some((_, value)) = headers
            .iter_mut()
            .find(|(n, _)| n.eq_ignore_ascii_case("content-length"))
        {
            *value = length;
        }
    }
    let framed = method == "HEAD"
        || status == 204
        || value(&headers, "content-length").is_some()
        || value(&headers, "transfer-encoding").is_some();
    let mut text = format!("{first}\r\n");
    for (name, value) in &headers {
        if !name.eq_ignore_ascii_case("connection") {
            text.extend([name, ": ", value, "\r\n"]);
        }
    }
    text.push_str(if framed {
        "\r\n"
    } else {
        "Connection: close\r\n\r\n"
    });
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(&body);
    if let Fault::CutAnswer(after) = fault {
        bytes.truncate(after.min(bytes.len() as u64 - 1) as usize);
        out.write_all(&bytes)?;
        return Ok(false);
    }
    out.write_all(&bytes)?;
    Ok(framed)
}

/// False when `take` wants no more.
fn copy(
    from: &mut BufReader<&TcpStream>,
    mut size: u64,
    take: &mut dyn FnMut(&[u8]) -> bool,
) -> std::io::Result<bool> {
    while size > 0 {
        let buffer = from.fill_buf()?;
        if buffer.is_empty() {
            return Ok(false);
        }
        let n = (buffer.len() as u64).min(size).min(64 << 10) as usize;
        let goes_on = take(&buffer[..n]);
        from.consume(n);
        size -= n as u64;
        if !goes_on {
            return Ok(false);
        }
    }
    Ok(true)
}
