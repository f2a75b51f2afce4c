//! A small SMTP server: it takes e-mails with or without STARTTLS and authentication, and answers what the test says.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::site::PATIENCE;

const HELD: &str = "no test panics while it holds this";

/// An e-mail as it was received.
#[derive(Clone, Debug, Default)]
pub struct Received {
    pub to: Vec<String>,
    /// Head and body with `\r\n`, as sent.
    pub text: String,
    pub encrypted: bool,
    /// `USER:PASSWORD`.
    pub login: Option<String>,
}

impl Received {
    /// Returns the value of a field of the head, unfolded.
    pub fn field(&self, name: &str) -> String {
        let head = self.text.split("\r\n\r\n").next().unwrap_or_default();
        let head = head.replace("\r\n ", " ");
        let field = head.lines().find_map(|line| {
            let (field, value) = line.split_once(':')?;
            field
                .eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        });
        field.unwrap_or_default()
    }

    /// Returns the body, decoded.
    pub fn body(&self) -> String {
        let (_, body) = self.text.split_once("\r\n\r\n").unwrap_or_default();
        match self.field("content-transfer-encoding").as_str() {
            "base64" => {
                let text: String = body.split_whitespace().collect();
                String::from_utf8(BASE64_STANDARD.decode(text).unwrap_or_default())
                    .unwrap_or_default()
            }
            "quoted-printable" => unquoted(body),
            _ => body.to_owned(),
        }
    }
}

fn unquoted(text: &str) -> String {
    let joined = text.replace("=\r\n", "");
    let mut bytes = Vec::new();
    let mut rest = joined.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).filter(|_| first == b'=');
        match code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_default()
}

#[derive(Default)]
struct State {
    received: Vec<Received>,
    /// Number of recipients that were named.
    asked: usize,
    /// Answers to the next recipients; then each is accepted.
    answers: VecDeque<&'static str>,
}

/// The server; it runs until the test's process ends.
#[derive(Clone)]
pub struct Smtp {
    pub at: SocketAddr,
    state: Arc<Mutex<State>>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

struct Session {
    stream: Box<dyn Stream>,
    state: Arc<Mutex<State>>,
    mail: Received,
}

impl Session {
    fn say(&mut self, text: &str) -> std::io::Result<()> {
        self.stream.write_all(format!("{text}\r\n").as_bytes())?;
        self.stream.flush()
    }

    /// Reads up to `end`, and returns what is before it.
    fn read_to(&mut self, end: &str) -> std::io::Result<String> {
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(end.as_bytes()) {
            self.stream.read_exact(&mut byte)?;
            text.push(byte[0]);
        }
        text.truncate(text.len() - end.len());
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Answers until the client leaves. Returns whether it asks for TLS.
    fn serve(&mut self, tls: bool) -> std::io::Result<bool> {
        loop {
            let line = self.read_to("\r\n")?;
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match verb.to_ascii_uppercase().as_str() {
                "EHLO" if tls && !self.mail.encrypted => {
                    self.say("250-test\r\n250 STARTTLS")?;
                }
                "EHLO" => self.say("250-test\r\n250 AUTH PLAIN")?,
                "STARTTLS" => {
                    self.say("220 go on")?;
                    return Ok(true);
                }
                "AUTH" => {
                    let login = rest.strip_prefix("PLAIN ").unwrap_or_default();
                    let login = BASE64_STANDARD.decode(login).unwrap_or_default();
                    let login = String::from_utf8_lossy(&login).replace('\0', ":");
                    self.mail.login = Some(login.trim_start_matches(':').to_owned());
                    self.say("235 ok")?;
                }
                "RCPT" => {
                    self.mail.to.push(rest.to_owned());
                    let answer = {
                        let mut state = self.state.lock().expect(HELD);
                        state.asked += 1;
                        state.answers.pop_front()
                    };
                    self.say(answer.unwrap_or("250 ok"))?;
                }
                "DATA" => {
                    self.say("354 go on")?;
                    self.mail.text = self.read_to("\r\n.\r\n")?;
                    let mail = self.mail.clone();
                    self.state.lock().expect(HELD).received.push(mail);
                    self.say("250 taken")?;
                }
                "QUIT" => {
                    self.say("221 bye")?;
                    return Ok(false);
                }
                _ => self.say("250 ok")?,
            }
        }
    }
}

fn serve(
    stream: TcpStream,
    state: Arc<Mutex<State>>,
    tls: Option<Arc<rustls::ServerConfig>>,
) -> std::io::Result<()> {
    let plain = stream.try_clone()?;
    let mut session = Session {
        stream: Box::new(stream),
        state: Arc::clone(&state),
        mail: Received::default(),
    };
    session.say("220 test")?;
    let secure = session.serve(tls.is_some())?;
    if let Some(config) = tls.filter(|_| secure) {
        let connection = rustls::ServerConnection::new(config).map_err(std::io::Error::other)?;
        let mut session = Session {
            stream: Box::new(rustls::StreamOwned::new(connection, plain)),
            state,
            mail: Received {
                encrypted: true,
                ..Received::default()
            },
        };
        session.serve(true)?;
    }
    Ok(())
}

impl Smtp {
    /// Starts a server; with `tls`, it takes e-mails after STARTTLS only.
    pub fn start(tls: Option<Arc<rustls::ServerConfig>>) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let smtp = Self {
            at: listener.local_addr()?,
            state: Arc::default(),
        };
        let state = Arc::clone(&smtp.state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, tls) = (Arc::clone(&state), tls.clone());
                std::thread::spawn(move || serve(stream, state, tls));
            }
        });
        Ok(smtp)
    }

    /// Sets the answers to the next recipients.
    pub fn answer(&self, answers: &[&'static str]) {
        self.state.lock().expect(HELD).answers.extend(answers);
    }

    pub fn asked(&self) -> usize {
        self.state.lock().expect(HELD).asked
    }

    /// Waits until so many e-mails have come, and returns all.
    pub async fn until(&self, count: usize) -> Result<Vec<Received>, Box<dyn std::error::Error>> {
        let begun = Instant::now();
        loop {
            let received = self.state.lock().expect(HELD).received.clone();
            if received.len() >= count {
                return Ok(received);
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("{} of {count} e-mails", received.len()).into());
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}
