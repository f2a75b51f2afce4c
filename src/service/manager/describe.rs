//! Completes the description of the API with what the middleware does for all operations: conditional requests, and links to
//! the next page.

use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::{
    Header, HeaderBuilder, ObjectBuilder, OpenApi, RefOr, Required, Response, ResponseBuilder, Type,
};

fn header(description: &str) -> RefOr<Header> {
    let text = ObjectBuilder::new().schema_type(Type::String);
    let header = HeaderBuilder::new().schema(Some(text));
    RefOr::T(header.description(Some(description)).build())
}

fn parameter(name: &str, description: &str) -> RefOr<Parameter> {
    let text = ObjectBuilder::new().schema_type(Type::String);
    let parameter = ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .schema(Some(text));
    RefOr::T(parameter.description(Some(description)).build())
}

fn response<'a>(operation: &'a mut Operation, status: &str) -> Option<&'a mut Response> {
    match operation.responses.responses.get_mut(status)? {
        RefOr::T(response) => Some(response),
        RefOr::Ref(_) => None,
    }
}

/// Describes a GET: `ETag`, `If-None-Match`, and the link of a list.
fn describe_get(operation: &mut Operation) {
    let parameters = operation.parameters.get_or_insert_default();
    let is_list = parameters
        .iter()
        .any(|one| matches!(one, RefOr::T(one) if one.name == "cursor"));
    parameters.push(parameter(
        "If-None-Match",
        "The ETag of an earlier response: the response is 304 while nothing has changed",
    ));
    if let Some(found) = response(operation, "200") {
        let tag = "Changes with the body; for If-None-Match";
        found.headers.insert("ETag".to_owned(), header(tag));
        if is_list {
            let link = "The next page, with `rel=\"next\"`; absent on the last page";
            found.headers.insert("Link".to_owned(), header(link));
        }
    }
    let unchanged = ResponseBuilder::new()
        .description("It is as it was with this ETag")
        .build();
    let responses = &mut operation.responses.responses;
    responses.insert("304".to_owned(), RefOr::T(unchanged));
}

/// Completes the description.
pub(super) fn complete(openapi: &mut OpenApi) {
    for (path, item) in &mut openapi.paths.paths {
        if !path.starts_with("/api/") || path.ends_with("/events") {
            continue;
        }
        if let Some(operation) = &mut item.get {
            describe_get(operation);
        }
        for operation in [&mut item.post, &mut item.delete].into_iter().flatten() {
            if let Some(found) = response(operation, "202") {
                let at = "Where the state of the save is";
                found.headers.insert("Location".to_owned(), header(at));
            }
        }
    }
}
