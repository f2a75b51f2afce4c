//! Reads blobs as streams, or parts of them.

use bytes::Bytes;
use http::header::{CONTENT_RANGE, RANGE};
use http::{HeaderValue, Method, StatusCode};
use reqwest::Response;
use sha2::{Digest as _, Sha256};

use super::error::{Error, Request, Step};
use super::host::Call;
use super::{Repository, header_text};
use crate::common::digest::Digest;
use crate::common::reference;

impl Repository {
    /// Reads a blob as a stream, which is verified at its end. `size` is its size in bytes, if known.
    pub async fn blob_stream(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<BlobStream, Error> {
        let url = self.url(&format!("blobs/{digest}")).await?;
        let call = self.call(Step::ReadBlob, Method::GET, url);
        let response = self.host.call(&call).await?;
        if let (Some(expected), Some(found)) = (size, response.content_length())
            && expected != found
        {
            return Err(Error::Size {
                what: format!("blob {digest} from {}", self.name()),
                expected,
                found,
            });
        }
        Ok(BlobStream {
            repository: self.clone(),
            call,
            response: Some(response),
            hasher: Sha256::new(),
            digest: *digest,
            size,
            read: 0,
            skip: 0,
            failed: 0,
        })
    }

    /// Reads `length` bytes of a blob from `offset` on into memory. They are not verified. Returns `None` if the registry
    /// ignores or refuses requests for a part of a blob.
    pub async fn blob_range(
        &self,
        digest: &Digest,
        offset: u64,
        length: u64,
    ) -> Result<Option<Bytes>, Error> {
        if length == 0 {
            return Ok(Some(Bytes::new()));
        }
        let url = self.url(&format!("blobs/{digest}")).await?;
        let mut call = self.call(Step::ReadBlob, Method::GET, url);
        call.accept = &[400, 405, 416, 501];
        let range = format!("{offset}-{}", offset.saturating_add(length - 1));
        if let Ok(value) = HeaderValue::from_str(&format!("bytes={range}")) {
            call.headers.insert(RANGE, value);
        }
        let request = Request::new(&call.method, &call.url);
        let mut failed = 0;
        loop {
            let response = self.host.call_after(&call, &mut failed).await?;
            let said = header_text(response.headers(), &CONTENT_RANGE);
            let is_range = said.is_some_and(|said| said.starts_with(&format!("bytes {range}/")));
            if response.status() != StatusCode::PARTIAL_CONTENT || !is_range {
                return Ok(None);
            }
            let body = self
                .host
                .read_body(&request, "the part of the blob", response, length);
            let error = match body.await {
                Ok(bytes) if bytes.len() as u64 == length => return Ok(Some(bytes)),
                Ok(bytes) => Error::Size {
                    what: format!("a part of blob {digest} from {}", self.name()),
                    expected: length,
                    found: bytes.len() as u64,
                },
                Err(error) => error,
            };
            failed += 1;
            let pause = self.host.pause(failed, &error).ok_or(error)?;
            tokio::time::sleep(pause).await;
        }
    }
}

/// A blob that is being read from a registry.
pub struct BlobStream {
    repository: Repository,
    call: Call,
    response: Option<Response>,
    hasher: Sha256,
    digest: Digest,
    size: Option<u64>,
    read: u64,
    /// Bytes to skip at the front of the answer, because they were read before and the registry does not support
    /// ranges.
    skip: u64,
    failed: u32,
}

impl BlobStream {
    /// Returns the next bytes, or `None` at the end. The end is reported only if size and digest are correct.
    ///
    /// A broken connection is replaced by one that continues at the same offset.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            let error = match self.read_some().await {
                Ok(Some(mut bytes)) => {
                    let skipped = self.skip.min(bytes.len() as u64);
                    self.skip -= skipped;
                    let bytes = bytes.split_off(skipped as usize);
                    if bytes.is_empty() {
                        continue;
                    }
                    self.hasher.update(&bytes);
                    self.read += bytes.len() as u64;
                    if let Some(expected) = self.size.filter(|&size| self.read > size) {
                        return Err(self.wrong_size(expected));
                    }
                    // Progress resets the count of failures.
                    self.failed = 0;
                    return Ok(Some(bytes));
                }
                Ok(None) => {
                    if let Some(expected) = self.size.filter(|&size| self.read != size) {
                        return Err(self.wrong_size(expected));
                    }
                    let raw: [u8; 32] = std::mem::take(&mut self.hasher).finalize().into();
                    let found = Digest::from_hex(&hex::encode(raw))
                        .map_err(reference::ReferenceError::from)?;
                    if found != self.digest {
                        let from = self.repository.name();
                        return Err(Error::Digest {
                            what: "blob",
                            from,
                            expected: self.digest,
                            found,
                        });
                    }
                    return Ok(None);
                }
                Err(e) => e,
            };
            self.response = None;
            self.failed += 1;
            let pause = self
                .repository
                .host
                .pause(self.failed, &error)
                .ok_or(error)?;
            tokio::time::sleep(pause).await;
        }
    }

    async fn read_some(&mut self) -> Result<Option<Bytes>, Error> {
        let host = &self.repository.host;
        let request = Request::new(&self.call.method, &self.call.url);
        let response = if let Some(response) = &mut self.response {
            response
        } else {
            let mut call = self.call.clone();
            if let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", self.read)) {
                call.headers.insert(RANGE, range);
            }
            let response = host.attempt(&call).await?;
            let resumed = header_text(response.headers(), &CONTENT_RANGE)
                .is_some_and(|r| r.starts_with(&format!("bytes {}-", self.read)));
            self.skip = if resumed { 0 } else { self.read };
            self.response.insert(response)
        };
        let wait = host.stall_timeout().min(host.remaining());
        let next = tokio::time::timeout(wait, response.chunk());
        match host.watched(next).await {
            Ok(chunk) => chunk.map_err(|e| Error::transport(request, &e)),
            Err(_) => Err(host.timeout_error(request, host.stall_timeout())),
        }
    }

    fn wrong_size(&self, expected: u64) -> Error {
        let what = format!("blob {} from {}", self.digest, self.repository.name());
        Error::Size {
            what,
            expected,
            found: self.read,
        }
    }
}
