//! A minimal gRPC client to control a CRI server in tests: one unary call over a unix socket, and the few protobuf
//! fields that a pod needs. A generated client would need a protocol compiler and several crates.
//!
//! Formats: gRPC over HTTP/2 (`PROTOCOL-HTTP2.md`), protobuf wire encoding, field numbers of `runtime.v1`
//! (`api.proto`).

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};

/// A protobuf message under construction.
#[derive(Clone, Debug, Default)]
pub struct Message(Vec<u8>);

impl Message {
    pub fn new() -> Self {
        Self::default()
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub fn int(mut self, field: u32, value: u64) -> Self {
        self.varint(u64::from(field << 3));
        self.varint(value);
        self
    }

    pub fn bytes(mut self, field: u32, value: impl AsRef<[u8]>) -> Self {
        self.varint(u64::from(field << 3 | 2));
        self.varint(value.as_ref().len() as u64);
        self.0.extend_from_slice(value.as_ref());
        self
    }

    pub fn message(self, field: u32, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }

    pub fn strings<S: AsRef<str>>(self, field: u32, values: &[S]) -> Self {
        values
            .iter()
            .fold(self, |message, value| message.bytes(field, value.as_ref()))
    }

    /// Appends an entry of a `map<string, string>`.
    pub fn pair(self, field: u32, key: &str, value: &str) -> Self {
        self.message(field, &Self::new().bytes(1, key).bytes(2, value))
    }
}

/// The value of a received field.
#[derive(Clone, Debug)]
pub enum Value {
    Int(u64),
    Bytes(Vec<u8>),
}

/// The fields of a received message, in order.
#[derive(Clone, Debug, Default)]
pub struct Fields(Vec<(u32, Value)>);

impl Fields {
    fn parse(mut raw: &[u8]) -> Result<Self> {
        fn varint(raw: &mut &[u8]) -> Result<u64> {
            let mut value = 0;
            for shift in (0..64).step_by(7) {
                let (&byte, rest) = raw.split_first().context("a protobuf number ends early")?;
                *raw = rest;
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    return Ok(value);
                }
            }
            bail!("a protobuf number is too long")
        }
        let mut fields = Vec::new();
        while !raw.is_empty() {
            let key = varint(&mut raw)?;
            let value = match key & 7 {
                0 => Value::Int(varint(&mut raw)?),
                2 => {
                    let length = varint(&mut raw)? as usize;
                    let (value, rest) = raw
                        .split_at_checked(length)
                        .context("a protobuf field ends early")?;
                    raw = rest;
                    Value::Bytes(value.to_vec())
                }
                wire => bail!("protobuf wire type {wire} is not used by CRI"),
            };
            fields.push((key as u32 >> 3, value));
        }
        Ok(Self(fields))
    }

    pub fn text(&self, field: u32) -> String {
        self.0
            .iter()
            .find_map(|(number, value)| match value {
                Value::Bytes(bytes) if *number == field => {
                    Some(String::from_utf8_lossy(bytes).into_owned())
                }
                _ => None,
            })
            .unwrap_or_default()
    }

    pub fn int(&self, field: u32) -> u64 {
        self.0
            .iter()
            .find_map(|(number, value)| match value {
                Value::Int(int) if *number == field => Some(*int),
                _ => None,
            })
            .unwrap_or_default()
    }
}

/// Calls `method` (`/package.Service/Method`) of the server at `socket` and waits for the response.
pub fn call(socket: &Path, method: &str, request: &Message) -> Result<Fields> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let raw = runtime
        .block_on(unary(socket, method, &request.0))
        .with_context(|| format!("calling {method}"))?;
    Fields::parse(&raw)
}

async fn unary(socket: &Path, method: &str, message: &[u8]) -> Result<Vec<u8>> {
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .context("connecting")?;
    let (client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://localhost{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut body) = client.ready().await?.send_request(request, false)?;
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(message);
    body.send_data(Bytes::from(frame), true)?;

    let (head, mut body) = response.await?.into_parts();
    let mut raw = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        raw.extend_from_slice(&chunk);
    }
    // A call that fails at once has its status in the headers.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    let header = |name: &str| {
        trailers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    let status = header("grpc-status");
    ensure!(status == "0", "status {status}: {}", header("grpc-message"));
    ensure!(
        raw.len() >= 5 && raw[0] == 0,
        "the answer is no plain gRPC message"
    );
    Ok(raw.split_off(5))
}
