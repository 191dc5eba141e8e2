# Two buckets: what goes in, which nodes can only read, and what comes out.

locals {
  buckets = { sources = var.sources_bucket, runs = var.runs_bucket }
}

resource "aws_s3_bucket" "these" {
  for_each      = local.buckets
  bucket        = each.value
  force_destroy = var.disposable
}

resource "aws_s3_bucket_ownership_controls" "these" {
  for_each = aws_s3_bucket.these
  bucket   = each.value.id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "these" {
  for_each                = aws_s3_bucket.these
  bucket                  = each.value.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "these" {
  for_each = aws_s3_bucket.these
  bucket   = each.value.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_versioning" "these" {
  for_each = aws_s3_bucket.these
  bucket   = each.value.id
  versioning_configuration {
    status = "Enabled"
  }
}

# Faces that were removed must go for good: old versions end after a while.
resource "aws_s3_bucket_lifecycle_configuration" "these" {
  for_each = aws_s3_bucket.these
  bucket   = each.value.id
  rule {
    id     = "old"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = var.old_days
    }
    expiration {
      expired_object_delete_marker = true
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
  depends_on = [aws_s3_bucket_versioning.these]
}

data "aws_iam_policy_document" "tls" {
  for_each = aws_s3_bucket.these
  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [each.value.arn, "${each.value.arn}/*"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "these" {
  for_each   = aws_s3_bucket.these
  bucket     = each.value.id
  policy     = data.aws_iam_policy_document.tls[each.key].json
  depends_on = [aws_s3_bucket_public_access_block.these]
}
