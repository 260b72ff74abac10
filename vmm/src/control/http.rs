//! The little of HTTP/1.1 (RFC 9112) that the control socket speaks: one request and one response
//! per connection, bodies with `Content-Length` or up to the connection's end, nothing chunked.

use std::io::{self, BufRead, Read, Write};

use serde::Serialize;

use super::{ControlError, Problem};

/// The longest request or response line with all headers.
const HEAD_BYTES: u64 = 16 << 10;
/// The longest body of a request.
const BODY_BYTES: u64 = 1 << 20;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its method.
    pub method: String,
    /// Its target, an absolute path.
    pub path: String,
    /// Its body.
    pub body: Vec<u8>,
}

/// The head of a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// The status code.
    pub status: u16,
    /// Bytes of the body; none: up to the connection's end.
    pub body_bytes: Option<u64>,
}

fn wrong(text: impl Into<String>) -> ControlError {
    ControlError::Protocol(text.into())
}

/// Waits for the first byte of a message; false: the connection ended before it.
///
/// # Errors
/// The connection failed, or took too long.
pub fn has_begun(from: &mut impl BufRead) -> io::Result<bool> {
    loop {
        match from.fill_buf() {
            // A socket with a time limit is not read again by the kernel after a signal.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            bytes => return Ok(!bytes?.is_empty()),
        }
    }
}

/// The lines before the empty one, without their ends.
fn read_head(from: &mut impl BufRead) -> Result<Vec<String>, ControlError> {
    let mut from = from.take(HEAD_BYTES);
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        from.read_until(b'\n', &mut line)?;
        let Some(text) = line.strip_suffix(b"\n") else {
            let why = if from.limit() == 0 { "the head is too long" } else { "it ended within the head" };
            return Err(wrong(why));
        };
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if text.is_empty() {
            return Ok(lines);
        }
        lines.push(String::from_utf8(text.to_vec()).map_err(|_| wrong("the head is no text"))?);
    }
}

/// The value of `Content-Length`.
fn content_length(headers: &[String]) -> Result<Option<u64>, ControlError> {
    let mut found = None;
    for header in headers {
        let (name, value) = header.split_once(':').ok_or_else(|| wrong("a header without a colon"))?;
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(wrong("transfer codings are not understood"));
        }
        if name.eq_ignore_ascii_case("content-length") {
            let length = value.trim().parse().map_err(|_| wrong("the length is no number"))?;
            if found.replace(length).is_some() {
                return Err(wrong("two lengths"));
            }
        }
    }
    Ok(found)
}

/// Reads a request. None: the connection ended before it began.
///
/// # Errors
/// It makes no sense, is too long, or the connection failed.
pub fn read_request(from: &mut impl BufRead) -> Result<Option<Request>, ControlError> {
    if !has_begun(from)? {
        return Ok(None);
    }
    let lines = read_head(from)?;
    let [first, headers @ ..] = lines.as_slice() else { return Err(wrong("an empty request")) };
    let parts: Vec<_> = first.split(' ').collect();
    let [method, path, "HTTP/1.1" | "HTTP/1.0"] = parts[..] else {
        return Err(wrong("no HTTP/1.1 request"));
    };
    let length = content_length(headers)?.unwrap_or(0);
    if length > BODY_BYTES {
        return Err(wrong(format!("a body of {length} bytes, {BODY_BYTES} is the most")));
    }
    let mut body = Vec::new();
    from.take(length).read_to_end(&mut body)?;
    if crate::words::wide(body.len()) < length {
        return Err(wrong("it ended within the body"));
    }
    Ok(Some(Request { method: method.to_owned(), path: path.to_owned(), body }))
}

/// Writes a request.
///
/// # Errors
/// The connection failed.
pub fn write_request(to: &mut impl Write, request: &Request) -> io::Result<()> {
    let mut bytes = format!(
        "{} {} HTTP/1.1\r\nHost: salp\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        request.method,
        request.path,
        request.body.len()
    )
    .into_bytes();
    bytes.extend(&request.body);
    to.write_all(&bytes)
}

/// Reads the head of a response.
///
/// # Errors
/// It makes no sense, or the connection failed.
pub fn read_response(from: &mut impl BufRead) -> Result<ResponseHead, ControlError> {
    let lines = read_head(from)?;
    let [first, headers @ ..] = lines.as_slice() else { return Err(wrong("an empty response")) };
    let status = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    let status = status.and_then(|text| text.parse().ok()).ok_or_else(|| wrong("no HTTP/1.1 response"))?;
    Ok(ResponseHead { status, body_bytes: content_length(headers)? })
}

/// Writes the head of a response that goes on to the connection's end.
///
/// # Errors
/// The connection failed.
pub fn write_stream_head(to: &mut impl Write) -> io::Result<()> {
    to.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n")
}

/// Writes a whole response in JSON.
///
/// # Errors
/// The connection failed.
pub fn write_json(to: &mut impl Write, status: u16, body: &impl Serialize) -> io::Result<()> {
    write_response(to, status, "application/json", body)
}

/// Writes an error as a response.
///
/// # Errors
/// The connection failed.
pub fn write_problem(to: &mut impl Write, problem: &Problem) -> io::Result<()> {
    write_response(to, problem.status, "application/problem+json", problem)
}

fn write_response(to: &mut impl Write, status: u16, kind: &str, body: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(body)?;
    let mut bytes = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        reason(status),
        body.len()
    )
    .into_bytes();
    bytes.extend(body);
    to.write_all(&bytes)
}

/// The standard phrase of a status (RFC 9110).
#[must_use]
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        422 => "Unprocessable Content",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &[u8]) -> Result<Option<Request>, ControlError> {
        read_request(&mut { text })
    }

    #[test]
    fn what_is_written_is_read() {
        let sent = Request { method: "POST".into(), path: "/v1/vms/a/fork".into(), body: b"{}".to_vec() };
        let mut bytes = Vec::new();
        write_request(&mut bytes, &sent).expect("memory");
        assert_eq!(request(&bytes).expect("it is whole"), Some(sent));
        let mut bytes = Vec::new();
        write_json(&mut bytes, 201, &vec![1, 2]).expect("memory");
        let mut rest = bytes.as_slice();
        let head = read_response(&mut rest).expect("it is whole");
        assert_eq!((head, rest), (ResponseHead { status: 201, body_bytes: Some(5) }, &b"[1,2]"[..]));
        let mut bytes = Vec::new();
        write_stream_head(&mut bytes).expect("memory");
        let head = read_response(&mut bytes.as_slice()).expect("it is whole");
        assert_eq!(head, ResponseHead { status: 200, body_bytes: None });
    }

    #[test]
    fn wrong_requests_are_refused() {
        assert!(matches!(request(b""), Ok(None)));
        let long = [b"GET / HTTP/1.1\r\nA: ".as_slice(), &[b'x'; 20_000], b"\r\n\r\n"].concat();
        let wrong: [&[u8]; 10] = [
            b"GET /",
            b"\r\n",
            b"GET / HTTP/2\r\n\r\n",
            b"GET  / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &long,
        ];
        for bytes in wrong {
            let result = request(bytes);
            assert!(matches!(result, Err(ControlError::Protocol(_))), "{result:?}");
        }
    }
}
